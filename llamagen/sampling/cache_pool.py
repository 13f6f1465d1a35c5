"""Key-value caches that decode calls reuse, one call at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llamagen.models.gpt_config import GPTConfig
from llamagen.models.kv_cache import KVCache


class CachePool:
    """Pool of key-value caches. A call takes a cache out of the pool and returns it at the end.

    Concurrent calls never share a cache: if the pool is empty, a call allocates a new one. footgun: on a GPU a cache
    returns to the pool when the work of its call is queued, not when it is done. So the next call must use the same
    CUDA stream, as threads do by default.

    Args:
        config: shape of the model.
        device: device of the caches.
        dtype: dtype of the caches.
    """

    def __init__(self, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.free: list[KVCache] = []  # append and pop are atomic

    @contextmanager
    def take(self, rows: int) -> Iterator[KVCache]:
        """Use an empty cache of at least ``rows`` rows within a ``with`` statement."""
        cache = self._allocate(rows)
        cache.length = 0
        try:
            yield cache
        finally:
            self.free.append(cache)

    def _allocate(self, rows: int) -> KVCache:
        try:
            cache = self.free.pop()
        except IndexError:
            return KVCache.allocate(self.config, rows, self.device, self.dtype)
        if cache.keys.shape[1] >= rows:
            return cache
        del cache  # a larger one is allocated after this one is freed
        return KVCache.allocate(self.config, rows, self.device, self.dtype)
