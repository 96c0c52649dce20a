"""The operator's settings, and the only place that reads the environment for them beside the command line."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from .errors import ConfigError
from .pruning import PruneParams
from .speculation import MAX_DRAFT_TOKENS, parse_draft

MAX_LENGTH = 2**30
"""Tokens of a sequence: positions are 32-bit numbers."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Of server and engine process, whose lines come in turn."""
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine process is started with."""

    model: str
    """Folder of a checkpoint, or a hub name that is in the local cache or can be fetched."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    runner: Literal["auto", "native", "transformers"] = "auto"
    """auto: native where the architecture is known to it, else transformers."""
    attention_backend: Literal["auto", "reference", "cpu", "triton", "xformers"] = "auto"
    """Whose kernels compute; auto: C++ on a CPU; on a GPU Triton, if its kernels prove right at start."""
    cuda_graphs: bool = True
    """With the backend triton: replay decode steps as CUDA graphs, captured when first needed."""
    max_model_len: int | None = None
    """Tokens, prompt and output together; None: what the model was trained for."""
    max_stream_len: int | None = None
    """Tokens of a sequence whose positions close up as it forgets (`PruneParams.positions`); None, or fewer than
    `max_model_len`: as many as of any other."""
    max_num_seqs: int = 64
    """Most sequences that run at once."""
    max_batch_tokens: int = 2048
    """Most tokens of one step; longer prompts are computed in chunks."""
    max_waiting: int = 1024
    """Most sequences that wait; beyond, requests are refused with a retry time."""
    kv_memory: int | None = None
    """Bytes of the KV pool; None: a share of what the device has free."""
    page_size: int = 16
    """Entries of one KV page."""
    prefix_cache: bool = True
    """Keep computed prefixes while there is room, for requests that begin alike."""
    swap_memory: int = 0
    """Bytes of host memory for preempted sequences and for prefixes that leave the KV pool; 0: none."""
    max_cache_ttl: float = 3600.0
    """Longest time in seconds that a request may have its prompt kept for after its end; 0: not at all."""
    cache_file: str | None = None
    """File in which computed prefixes outlast a restart."""
    prune: PruneParams | None = None
    """How requests that do not say so themselves are pruned; None: not at all."""
    pressure: Literal["preempt", "prune"] = "preempt"
    """prune: before a sequence is preempted, those that allow it are pruned down to what they must keep."""
    trust_remote_code: bool = False
    """Allow a checkpoint's own Python code to run."""
    policy: Literal["fcfs", "priority", "fair", "sjf"] = "fcfs"
    """Who is served first: by arrival, by the request's priority, the tenant that got least, the shortest output."""
    max_itl_ms: float | None = None
    """Milliseconds that a step which decodes should stay within: prompt chunks are cut to it; None: no target."""
    max_waiting_tokens: int | None = None
    """Most prompt tokens that wait beside one request; beyond, requests are refused with a retry time."""
    queue_timeout: float | None = None
    """Seconds in which a request must start; None: no limit."""
    draft: str = "auto"
    """Who drafts: `ngram`, the folder or hub name of a draft model, `ngram+` such a name for both, `layerskip:N`,
    `none`; `auto`: n-grams, with the draft model that the checkpoint brings along in `draft/` if it does."""
    draft_tokens: int | None = None
    """Tokens of every draft; None: as many as measured acceptance and step costs make worth while, 0 included."""

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> "EngineConfig":
        """From a caller's keywords, names and types checked too. Raises `ConfigError`."""
        try:
            return msgspec.convert(settings, cls)
        except msgspec.ValidationError as error:
            text = str(error).replace("Object contains unknown field", "there is no setting")
            reason, _, field = text.partition(" - at `$.")
            name = field.rstrip("`")
            raise ConfigError(f"{name}: {reason}" if name else reason, param=name or None) from error

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_batch_tokens", "max_waiting", "page_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}", param=name)
        for name in ("max_model_len", "max_stream_len"):
            value = getattr(self, name)
            if value is not None and not 2 <= value <= MAX_LENGTH:
                raise ConfigError(f"{name} must be from 2 to {MAX_LENGTH:,}, got {value:,}", param=name)
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_num_seqs ({self.max_num_seqs})",
                param="max_batch_tokens",
            )
        parse_draft(self.draft)
        if self.draft_tokens is not None and not 1 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(
                f"draft_tokens must be 1 to {MAX_DRAFT_TOKENS}, got {self.draft_tokens}", param="draft_tokens"
            )
        if self.swap_memory < 0:
            raise ConfigError(f"swap_memory must not be negative, got {self.swap_memory}", param="swap_memory")
        if not 0 <= self.max_cache_ttl < float("inf"):
            raise ConfigError(f"max_cache_ttl must be a number of seconds, got {self.max_cache_ttl}")
        for name in ("max_itl_ms", "max_waiting_tokens", "queue_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be positive, got {value}", param=name)
        if self.kv_memory is not None and self.kv_memory < 1:
            raise ConfigError(f"kv_memory must be positive, got {self.kv_memory}", param="kv_memory")


def parse_size(text: str) -> int:
    """Bytes of `4GiB`, `512MiB`, `1.5g`, `1000000`; raises `ConfigError` on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if not match:
        raise ConfigError(f"not a size: {text!r} (examples: 4GiB, 512MiB, 2g)")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def embedded_model() -> Path:
    """Folder of `quire-mini`, the model that ships with the package."""
    return Path(__file__).resolve().parent.parent / "models" / "quire-mini"
