"""The compiled decode step on NVIDIA GPUs: Triton kernels in a CUDA graph."""
