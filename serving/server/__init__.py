"""The HTTP server for a trained model: ``python -m serving.server MODEL``. Needs the extra ``serve``."""
