"""What a GPT costs in parameters, memory, operations and GPU days. Run ``python -m llamagen.cost``."""
