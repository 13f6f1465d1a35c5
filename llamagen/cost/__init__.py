"""Parameters, memory, operations and GPU days of a GPT. Run ``python -m llamagen.cost``."""
