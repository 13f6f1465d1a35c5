"""Settings of the whole test suite."""

import torch


def pytest_configure() -> None:
    """One thread: small tensors are several times faster so where cores are shared, and sums keep their order."""
    torch.set_num_threads(1)
