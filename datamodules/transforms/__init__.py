"""From bytes to arrays: decoding and cropping."""
