"""Callbacks that write the outputs of ``predict``: images, codes, features."""
