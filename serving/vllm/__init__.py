"""The autoregressive model in vLLM: a plugin for vLLM itself, and an engine of our server that uses it."""
