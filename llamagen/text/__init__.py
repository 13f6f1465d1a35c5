"""Captions: cleaning, features of a frozen T5 encoder, and the condition of a text model."""

from llamagen.text.cleaning import Cleaning, clean_caption, first_sentence
from llamagen.text.condition import Condition, TextCondition
from llamagen.text.encoder import CaptionEncoder, EncodedCaptions, TextEncoderConfig
from llamagen.text.padding import pack, pad_left, unpack_left

__all__ = [
    "CaptionEncoder",
    "Cleaning",
    "Condition",
    "EncodedCaptions",
    "TextCondition",
    "TextEncoderConfig",
    "clean_caption",
    "first_sentence",
    "pack",
    "pad_left",
    "unpack_left",
]
