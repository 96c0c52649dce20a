"""Checkpoints on disk: finding one, checking that it is whole, and reading its tensors one at a time.

Only safetensors are read. Every shard's header is parsed and held against the file's size before a single weight is
loaded, so that a half-downloaded checkpoint is refused in milliseconds, with the name of the file at fault.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import ModelLoadError
from ..core.folders import model_folder
from .runner import ProgressCallback

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_HEADER_LIMIT = 100 * 2**20
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """The format's own name: F32, BF16, F16, I8, F8_E4M3, ..."""
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether it is stored in a floating-point type of 16 bits or more."""
        return self.dtype in _DTYPES


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder whose files were found whole."""

    name: str
    """As the operator gave it: folder or hub name."""
    folder: Path
    config: dict[str, Any]
    """config.json as it stands."""
    tensors: dict[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights: what config.json says, else the one that most bytes are stored in."""
        text_config = self.config.get("text_config") or {}
        for source in (self.config, text_config):
            named = source.get("dtype") or source.get("torch_dtype")
            found = getattr(torch, str(named).removeprefix("torch."), None) if named else None
            if isinstance(found, torch.dtype) and found.is_floating_point:
                return found
        sizes: dict[torch.dtype, int] = {}
        for entry in self.tensors.values():
            if entry.dtype in _DTYPES:
                kind = _DTYPES[entry.dtype]
                sizes[kind] = sizes.get(kind, 0) + entry.num_bytes
        return max(sizes, key=lambda kind: sizes[kind]) if sizes else torch.float32


def open_checkpoint(name: str, *, with_code: bool = False) -> Checkpoint:
    """Find the checkpoint `name` (a folder, or a hub name: local cache first) and check its files.

    `with_code` also fetches a hub checkpoint's own Python files. Raises `ModelLoadError` in one line, naming the
    file: no such folder, config.json missing or broken, pickled weights only, a missing or truncated shard.
    """
    folder = _find_folder(name, with_code)
    return Checkpoint(name, folder, read_config(folder), _read_tensor_table(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`; raises `ModelLoadError` where it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"{folder} holds no config.json; a model folder in Hugging Face format is needed")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `ModelLoadError` naming the file when it is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


class TensorReader:
    """Reads tensors of a checkpoint lazily, reporting progress in bytes; files stay mapped until `close`."""

    def __init__(self, checkpoint: Checkpoint, on_progress: ProgressCallback) -> None:
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._files: dict[Path, Any] = {}
        self._done = 0

    def read(self, name: str) -> Tensor:
        """The tensor `name` in host memory, in the type it is stored in; raises `ModelLoadError` if unreadable."""
        entry = self._checkpoint.tensors[name]
        try:
            if entry.file not in self._files:
                self._files[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            tensor: Tensor = self._files[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{entry.file}: tensor {name} cannot be read: {error}") from error
        self.skip(entry)
        return tensor

    def skip(self, entry: TensorEntry) -> None:
        """Count a tensor as done."""
        self._done += entry.num_bytes
        self._on_progress("loading weights", self._done, self._checkpoint.num_bytes)

    def close(self) -> None:
        """Let go of the mapped files."""
        self._files.clear()


def _find_folder(name: str, with_code: bool) -> Path:
    """The folder of `name`, fetching it from the hub if it is neither a folder nor in the local cache."""
    folder = model_folder(name)
    if folder is not None:
        return folder
    patterns = [*_HUB_PATTERNS, "*.py"] if with_code else _HUB_PATTERNS
    cached = _cached_snapshot(name)
    if cached is not None:
        return cached
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    # The hub client raises its own errors, the HTTP library's and plain ones; to the operator they mean the same.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelLoadError(
            f"{name} is not a folder, not in the local cache, and cannot be fetched from the hub: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def _cached_snapshot(name: str) -> Path | None:
    """The cached snapshot of hub model `name` if it holds a whole checkpoint, else None."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        read_config(folder)
        _read_tensor_table(folder)
    except (ModelLoadError, OSError, ValueError):
        # Not cached, or only its tokenizer is: fetch the rest.
        return None
    return folder


def _read_tensor_table(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder's safetensors files, by name, after checking index and shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_indexed(folder, index)
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(_no_weights_reason(folder))
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise ModelLoadError(
                    f"{file}: tensor {name} is also in {tensors[name].file.name}, and there is no index"
                )
            tensors[name] = entry
    return tensors


def _read_indexed(folder: Path, index: Path) -> dict[str, TensorEntry]:
    """The tensors that `index` lists, each looked up in the shard it names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no weight_map")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in sorted(set(weight_map.values())):
        # Names with a folder part could lead out of the checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelLoadError(f"{index} names a shard that is not a plain file name: {shard!r}")
        if not (folder / shard).is_file():
            raise ModelLoadError(f"{folder} lacks the shard {shard} that {index.name} lists")
        shards[shard] = read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ModelLoadError(f"{folder / shard} lacks the tensor {name} that {index.name} places there")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _no_weights_reason(folder: Path) -> str:
    """Why a folder without safetensors is refused."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        return f"{folder} holds no *.safetensors weights"
    return (
        f"{folder} holds only pickled weights ({pickles[0]}), which are not loaded because unpickling can run code; "
        "convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensor table of one safetensors file (8 bytes of length, a JSON header, the data).

    Raises `ModelLoadError` naming the file when it is truncated or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _HEADER_LIMIT or 8 + length > size:
            raise ModelLoadError(f"{file} is truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            tensors = _parse_header(file, header)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{file} has a broken safetensors header: {error}") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ModelLoadError(f"{file} is truncated: {size} bytes of {expected}")
    return tensors


def _parse_header(file: Path, header: dict[str, Any]) -> dict[str, TensorEntry]:
    """The entries of a header; raises `ValueError` and its kin where a field is missing or inconsistent."""
    tensors = {}
    for name, raw in header.items():
        if name == "__metadata__":
            continue
        begin, end = raw["data_offsets"]
        shape = tuple(int(width) for width in raw["shape"])
        dtype = _DTYPES.get(raw["dtype"])
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"tensor {name} of shape {list(shape)} does not fill its {end - begin} bytes")
        tensors[name] = TensorEntry(file, str(raw["dtype"]), shape, end - begin)
    return tensors
