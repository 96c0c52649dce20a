"""What the scheduler, the engine and the server need to know of a model, without its tensors."""

from collections import Counter
from collections.abc import Sequence

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shape facts of a decoder, read from its configuration."""

    name: str
    """Folder or hub name it was loaded from."""
    architecture: str
    """The class that the configuration names, e.g. `LlamaForCausalLM`."""
    num_layers: int
    """Layers that own KV (the order of the page table's first axis)."""
    num_kv_heads: int
    num_heads: int
    head_dim: int
    """Width of a stored key or value; the larger one where they differ."""
    vocab_size: int
    """Width of the logits."""
    max_context: int
    """Positions the model was trained for."""
    windows: tuple[int | None, ...]
    """Per layer: sliding window in tokens (an entry is seen while query - entry < window), None for full."""
    eos_token_ids: tuple[int, ...]
    """End tokens of the model's generation configuration."""
    rope_length: int | None = None
    """Tokens up to which all sequences rotate their keys alike; beyond, by the most tokens they can reach (dynamic and
    LongRoPE scaling). None: always alike."""

    def __post_init__(self) -> None:
        assert len(self.windows) == self.num_layers


def pages_needed(
    windows: Sequence[int | None], num_kv_heads: int, entries: int, *, page_size: int, max_batch_tokens: int
) -> int:
    """Most pages a sequence holds at any time until it has computed `entries` tokens; `windows` per layer.

    A windowed layer stops growing: before a chunk is added, all but the window and a begun page are dropped.
    """
    full = -(-entries // page_size)
    pages = 0
    for window, layers in Counter(windows).items():
        bound = full if window is None else -(-(window + max_batch_tokens) // page_size) + 1
        pages += layers * min(full, bound)
    return pages * num_kv_heads
