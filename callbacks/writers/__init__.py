"""Callbacks that write what ``predict`` returns: images, codes, features."""
