"""Pure ``nn.Module``s: the image tokenizer, the autoregressive model, the discriminators."""
