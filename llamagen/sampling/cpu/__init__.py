"""The compiled decode step on CPUs: C++ and the decoder that calls it."""
