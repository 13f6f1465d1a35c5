"""Datasets that worker processes import, without Lightning: from a number to an example."""
