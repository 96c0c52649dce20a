"""How large the KV pool is: bytes of a page, pages of a sequence, and what memory the device has to give."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from ..core.model_spec import ModelSpec, pages_needed

log = logging.getLogger("quire")

CPU_SHARE = 0.25
"""Of the available memory: the pool is one guest of a machine among others, and weights are page-cached."""
CUDA_SHARE = 0.9
"""Of what is free once the weights are loaded; the rest is for activations and the allocator's slack."""
_MIN_PAGES_PER_HEAD = 2
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Shape of the paged cache, all the engine needs to allocate and index it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    """Entries of a page."""
    num_slots: int
    """Sequences that can hold pages at once."""
    max_model_len: int
    """Tokens, prompt and output together."""
    dtype: torch.dtype

    @property
    def max_pages(self) -> int:
        """Columns of the page table: pages of the longest head, and one that is being filled."""
        return -(-self.max_model_len // self.page_size) + 1

    @property
    def bytes_per_page(self) -> int:
        """Keys, values and positions of one page."""
        return self.page_size * (2 * self.head_dim * self.dtype.itemsize + torch.int32.itemsize)

    @property
    def table_bytes(self) -> int:
        """The page table of all slots."""
        return self.num_slots * self.num_layers * self.num_kv_heads * self.max_pages * torch.int32.itemsize


def cache_layout(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> CacheLayout:
    """The layout for a model; a context longer than it was trained for is allowed with a warning."""
    max_model_len = config.max_model_len or spec.max_context
    if max_model_len > spec.max_context:
        log.warning(
            "max_model_len is %d, but the model was trained for %d positions: the output may degrade beyond them",
            max_model_len,
            spec.max_context,
        )
    return CacheLayout(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=config.page_size,
        num_slots=config.max_num_seqs,
        max_model_len=max_model_len,
        dtype=dtype,
    )


def pages_per_sequence(config: EngineConfig, spec: ModelSpec, layout: CacheLayout) -> int:
    """Pages of a sequence that grows as long as it may."""
    return pages_needed(
        spec.windows,
        spec.num_kv_heads,
        layout.max_model_len,
        page_size=layout.page_size,
        max_batch_tokens=config.max_batch_tokens,
    )


def num_pages(
    layout: CacheLayout, budget: int | None, device: torch.device, enough: int, draft_share: float = 0.0
) -> int:
    """Pages of the pool: as many as `budget` bytes hold, or by default a share of the free memory, at most `enough`.

    draft_share: bytes that a draft's cache takes of that share per byte of this one.

    Raises `ConfigError` if budget or page tables are more than the device has, or the pool would have less than two
    pages per head of every layer.
    """
    free = free_memory(device)
    if budget is not None and budget > free:
        raise ConfigError(
            f"kv_memory is {_readable(budget)}, but only {_readable(free)} of memory are free on {device.type}",
            param="kv_memory",
        )
    room = int((CUDA_SHARE if device.type == "cuda" else CPU_SHARE) * free) if budget is None else free - budget
    if layout.table_bytes > room:
        raise ConfigError(
            f"the page tables of {layout.num_slots} sequences of up to {layout.max_model_len:,} tokens take "
            f"{_readable(layout.table_bytes)}, but only {_readable(room)} of memory are there for them",
            param="max_model_len",
        )
    share = room - layout.table_bytes
    most = int(share / (1 + draft_share)) // layout.bytes_per_page
    pages = min(enough, most) if budget is None else budget // layout.bytes_per_page
    least = _MIN_PAGES_PER_HEAD * layout.num_layers * layout.num_kv_heads
    if pages < least and not (budget is None and pages == enough):
        raise ConfigError(
            f"the KV cache needs at least {_readable(least * layout.bytes_per_page)} ({_MIN_PAGES_PER_HEAD} pages of "
            f"{layout.page_size} entries for each of {layout.num_kv_heads} heads of {layout.num_layers} layers), but "
            f"gets {_readable(max(0, pages * layout.bytes_per_page if budget is None else budget))}",
            param="kv_memory",
        )
    return pages


def num_host_pages(layout: CacheLayout, budget: int) -> int:
    """Pages of the host pool in `budget` bytes; 0 for none.

    Raises `ConfigError` if the machine has not so much memory, or it does not hold one page per head of every layer.
    """
    free, least = free_memory(torch.device("cpu")), layout.num_layers * layout.num_kv_heads * layout.bytes_per_page
    if budget > free:
        raise ConfigError(
            f"swap_memory is {_readable(budget)}, but only {_readable(free)} of host memory are free",
            param="swap_memory",
        )
    if 0 < budget < least:
        raise ConfigError(
            f"swap_memory is {_readable(budget)}, but one page of each head takes {_readable(least)}",
            param="swap_memory",
        )
    return budget // layout.bytes_per_page


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now; on a CPU, what the container or the machine has to give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_machine_memory()]
    for limit, usage in _CGROUP_LIMITS:
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no such controller, or the limit reads "max"
            continue
    return max(0, min(limits))


def _machine_memory() -> int:
    """Available bytes as Linux estimates them; elsewhere all physical memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _readable(count: int) -> str:
    """Bytes for people, e.g. `1.5 GiB`."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.4g} {units[power]}"
