"""How the attention kernels cut up their work: tile sizes from the device's limits, split counts from its occupancy.

Host arithmetic only. Nothing here depends on one GPU model: preferences come from a short table, the device decides
which of them it can hold.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What of a device decides tiles and splits."""

    capability: int
    """Compute capability times ten: 75 Turing, 80 and 86 Ampere, 90 Hopper."""
    processors: int
    """Streaming multiprocessors."""
    shared_memory: int
    """Most bytes of shared memory one program can have."""
    shared_memory_per_processor: int
    """Bytes that the programs on one multiprocessor share."""


INTERPRETER_LIMITS = DeviceLimits(86, 4, 99 * 1024, 100 * 1024)
"""Of the interpreter on a CPU: a small device, so that small tests split their work as large batches do."""


@cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of a CUDA device (constant for it); of anything else, `INTERPRETER_LIMITS`."""
    if device.type != "cuda":
        return INTERPRETER_LIMITS
    found = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        10 * found.major + found.minor,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        found.shared_memory_per_multiprocessor,
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one program's work."""

    rows: int
    """Query rows: tokens times the query heads that share a kv head."""
    entries: int
    """Cache entries taken at a time."""
    warps: int
    stages: int
    """Depth of the software pipeline. A page id must come before its page: two stages per tile of entries in flight."""


DECODE_ROWS = 16
"""Fewest rows a tensor core product takes: one decode token of up to 16 grouped heads."""
VERIFY_ROWS = 64
"""Rows of a short chunk: up to 64 / G tokens to verify."""
CHUNK_ROWS = 128
"""Rows of one tile of a longer chunk."""

PREFERENCES: dict[int, tuple[Tile, ...]] = {
    # Memory-bound: many bytes in flight, and two programs on a multiprocessor hide each other's latency.
    DECODE_ROWS: (Tile(16, 64, 4, 5), Tile(16, 64, 4, 3), Tile(16, 32, 4, 3), Tile(16, 16, 4, 1)),
    VERIFY_ROWS: (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 16, 4, 1), Tile(16, 16, 4, 1)),
    # Compute-bound: eight warps share a tile of queries, so that scores and accumulator stay in registers.
    CHUNK_ROWS: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3), Tile(64, 16, 4, 1), Tile(16, 16, 4, 1)),
}
"""Per rows wanted, the tiles to try, best first."""
PLAIN_TILE = Tile(16, 16, 4, 1)
"""Where products run without tensor cores: float32 (kept exact), and Turing, which Triton has no matrix code for.
Operands are then held in registers in float32; any larger tile spills, and fills more shared memory than Turing has."""


def padded(width: int) -> int:
    """The power of two, at least 16, that holds `width` columns: what a tensor core product takes."""
    return max(16, 1 << (width - 1).bit_length())


_REGISTERS = 65536
"""32-bit registers that the programs on one multiprocessor share, on every device since Maxwell."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Widths and element size that decide how much memory a tile takes."""

    key_dim: int
    value_dim: int
    itemsize: int
    """Bytes of an element in shared memory."""


def shared_bytes(tile: Tile, shape: HeadShape, limits: DeviceLimits) -> int:
    """Estimate of an attention program's shared memory: entries in flight, queries, and Triton's own scratch.

    Read off what the compiler reports; `tests/kernels/test_triton_compiles.py` holds launches against the limits.
    """
    keys, values = padded(shape.key_dim), padded(shape.value_dim)
    itemsize = shape.itemsize
    if not uses_tensor_cores(shape, limits):
        return (tile.rows + tile.entries) * max(keys, values) * 4 + 4096
    # Hopper's warp group products read both operands from shared memory while the next are on their way.
    depth = max(1, (tile.stages - 1) // 2) + (limits.capability >= 90 and tile.rows >= 64)
    rows = tile.rows * (max(keys, values) + tile.entries)
    return (depth * tile.entries * (keys + values) + rows) * itemsize + 4096


def uses_tensor_cores(shape: HeadShape, limits: DeviceLimits) -> bool:
    """Whether the products of attention run on tensor cores."""
    return shape.itemsize <= 2 and limits.capability >= 80


@cache
def choose_tile(rows: int, shape: HeadShape, limits: DeviceLimits) -> Tile:
    """The first preference for `rows` (a key of `PREFERENCES`) that the device holds.

    Decode tiles are chosen to fit twice on a multiprocessor.
    """
    if not uses_tensor_cores(shape, limits):
        return PLAIN_TILE
    budget = limits.shared_memory
    if rows == DECODE_ROWS:
        budget = min(budget, limits.shared_memory_per_processor // 2 - 1024)
    for tile in PREFERENCES[rows]:
        if shared_bytes(tile, shape, limits) <= budget:
            return tile
    return PREFERENCES[rows][-1]


def resident_programs(tile: Tile, shape: HeadShape, limits: DeviceLimits) -> int:
    """Estimate of how many programs of `tile` run at once on the whole device, by shared memory and registers."""
    used = shared_bytes(tile, shape, limits) + 1024  # what the system adds to each program's
    registers = 128 if tile.rows == DECODE_ROWS else 255
    by_memory = limits.shared_memory_per_processor // used
    by_registers = _REGISTERS // (registers * 32 * tile.warps)
    return max(1, min(by_memory, by_registers)) * limits.processors


MAX_SPLITS = 64
_LAUNCH_ENTRIES = 128
"""What starting a program costs, in entries it could have read instead."""
_MERGE_ENTRIES = 8
"""What merging one more part of a row costs, in the same unit."""


@lru_cache(maxsize=4096)
def split_count(programs: int, resident: int, entries: int, step: int) -> int:
    """Into how many parts to split each head's `entries` so that `programs` programs finish soonest.

    `resident` programs run at once, so the parts run in waves, and a wave takes as long as its part is long; parts are
    multiples of `step` entries. 1 where the programs fill the device by themselves.
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, min(MAX_SPLITS, -(-entries // step)) + 1):
        waves = -(-programs * splits // resident)
        part = -(-entries // (splits * step)) * step
        cost = waves * (part + _LAUNCH_ENTRIES) + (_MERGE_ENTRIES * splits if splits > 1 else 0)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best
