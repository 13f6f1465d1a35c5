"""LlamaGen (arXiv 2406.06525) in plain PyTorch: models, losses, sampling and metrics. Never imports Lightning."""
