"""The autoregressive model in vLLM."""
