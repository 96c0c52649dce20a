"""Computed prefixes in a file, so that they outlast a restart: one safetensors file, written and read piece by piece.

`digests` [N, bytes] names the blocks, the next one to be given up first; `pages.i` [N * R, ...] are the i-th of the
cache's page tensors, R pages per block. The header carries a fingerprint of all that keys and values depend on.
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import ConfigError
from ..core.messages import EngineInfo
from ..core.prefix import StoredBlock
from ..models.checkpoint import open_checkpoint
from .sizing import CacheLayout

_FORMAT = "quire-prefixes-1"
_SAMPLE = 1024
"""Bytes read of each of a shard's sampled places."""
_SAMPLES = 64
"""Places of a shard: fine-tuned weights of the same shapes differ nearly everywhere."""
_BLOCKS = 64
"""Blocks read or written at a time."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.uint8: "U8"}


def fingerprint(info: EngineInfo, layout: CacheLayout) -> str:
    """Of the checkpoint (configuration, tensor headers, a sample of the weights), data type, shapes and rotation.

    Raises `ModelLoadError` if the checkpoint is not there any more.
    """
    checkpoint = open_checkpoint(info.model.name)
    shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.page_size, str(layout.dtype))
    digest = sha256(repr((_FORMAT, shape, info.runner, info.model.rope_length, info.model.windows)).encode())
    digest.update(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, entry in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, entry.dtype, entry.shape, entry.num_bytes)).encode())
    for path in sorted({entry.file for entry in checkpoint.tensors.values()}):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for place in range(_SAMPLES):
                file.seek(size * place // _SAMPLES)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def write(
    path: Path, mark: str, blocks: Sequence[StoredBlock], device: Sequence[Tensor], host: Sequence[Tensor]
) -> None:
    """Write `blocks` to `path`, in one piece or not at all; raises `OSError`.

    Only the owner may read it: what users wrote can be told from keys and values.
    """
    rows = sum(len(block.pages) for block in blocks)
    width = len(blocks[0].digest) if blocks else 0
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"digests": (torch.uint8, (len(blocks), width))}
    tensors |= {f"pages.{i}": (tensor.dtype, (rows, *tensor.shape[1:])) for i, tensor in enumerate(device)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            _write_header(file, mark, tensors)
            file.write(b"".join(block.digest for block in blocks))
            for index, tensor in enumerate(device):
                for block in blocks:
                    source = host[index] if block.in_host else tensor
                    pages = torch.from_numpy(block.pages).long().to(source.device)
                    file.write(source.index_select(0, pages).cpu().contiguous().view(torch.uint8).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_header(file: BinaryIO, mark: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": _FORMAT, "fingerprint": mark}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    file.write(struct.pack("<Q", len(data)) + data)


def read_digests(path: Path, mark: str) -> list[bytes]:
    """Names of the blocks in the file; raises `ConfigError` if it is broken or of another model or shape."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ConfigError(f"{path} is not a file of computed prefixes", param="cache_file")
            if metadata.get("fingerprint") != mark:
                raise ConfigError(f"{path} belongs to another model or other settings", param="cache_file")
            return [bytes(row.tolist()) for row in file.get_tensor("digests")]
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="cache_file") from error


def read_blocks(
    path: Path, skipped: int, blocks: Sequence[StoredBlock], device: Sequence[Tensor], host: Sequence[Tensor]
) -> None:
    """Fill the pages of `blocks`, which stand in the file after `skipped` others; raises `ConfigError` if it is broken.

    Then the pages hold anything.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for index in range(len(device)):
                stored = file.get_slice(f"pages.{index}")
                for first, some in _pieces(blocks):
                    rows = len(some[0].pages)
                    start = (skipped + first) * rows
                    contents = stored[start : start + len(some) * rows].split(rows)
                    for block, pages in zip(some, contents, strict=True):
                        target = host[index] if block.in_host else device[index]
                        where = torch.from_numpy(block.pages).long().to(target.device)
                        target.index_copy_(0, where, pages.to(target.device))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="cache_file") from error


def _pieces(blocks: Sequence[StoredBlock]) -> Iterator[tuple[int, Sequence[StoredBlock]]]:
    for first in range(0, len(blocks), _BLOCKS):
        yield first, blocks[first : first + _BLOCKS]
