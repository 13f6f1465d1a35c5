"""Trained models in one step: :class:`~llamagen.pretrained.model.LlamaGen`, which is also ``llamagen.LlamaGen``."""
