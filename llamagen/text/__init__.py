"""Captions: cleaned text, and the features that a frozen T5 encoder makes of it."""

from llamagen.text.cleaning import clean_caption, first_sentence
from llamagen.text.encoder import CaptionEncoder, EncodedCaptions, TextEncoderConfig
from llamagen.text.padding import pack, pad_left, unpack_left

__all__ = [
    "CaptionEncoder",
    "EncodedCaptions",
    "TextEncoderConfig",
    "clean_caption",
    "first_sentence",
    "pack",
    "pad_left",
    "unpack_left",
]
