"""Evaluation of images: image datasets, references, measurement, reports. See ``python -m evaluation --help``."""
