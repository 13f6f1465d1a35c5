"""A web page for a trained model: ``python -m serving.page SOURCE``. Needs the extra ``serve``."""
