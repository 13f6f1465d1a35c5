"""Decoding and cropping of images."""
