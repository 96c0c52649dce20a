"""The memory of the pools, or an error that names the setting which asked for too much."""

import torch

from ..core.errors import ConfigError
from .cache import KVCache
from .host_pool import HostPool
from .sizing import CacheLayout


def allocate(layout: CacheLayout, pages: int, device: torch.device) -> KVCache:
    """The device's pool; raises `ConfigError` if the device has no room for it after all."""
    try:
        return KVCache(layout, pages, device)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise ConfigError(
            f"the KV cache could not be allocated: {str(error).splitlines()[0]}", param="kv_memory"
        ) from error


def allocate_host(cache: KVCache, num_pages: int) -> HostPool:
    """The pool in host memory that `cache` swaps to; raises `ConfigError` if the memory is not there."""
    try:
        return HostPool(cache, num_pages)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"the host memory for swapping could not be allocated: {str(error).splitlines()[0]}", param="swap_memory"
        ) from error
