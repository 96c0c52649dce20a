"""Per-sequence RoPE for library models whose frequencies depend on the length (`dynamic`, `longrope`).

The library takes ONE length per forward pass, the largest position of the batch, so a long neighbour would change a
short sequence's keys. `PerSequenceRope` stands before the `forward` of a model's rotary module and calls it once per
distinct length in the batch, with that length as the largest position, then puts the rows together again. Like the
native runner it uses the most tokens a sequence can reach, fixed at admission, so that cached keys stay valid.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .rope import LENGTH_DEPENDENT


class PerSequenceRope:
    """Replaces `forward` of one rotary module; does nothing while `lengths` is None."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward = module.forward
        config: Any = module.config
        self._trained = int(_trained_length(config))
        self.lengths: Tensor | None = None
        """[T] int64: the most tokens each row's sequence can reach."""

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's result for x [1, T, E] and position_ids [1, T]: one tensor, or a tuple of them, [1, T, ...]."""
        if self.lengths is None:
            return self._forward(x, position_ids, *args, **kwargs)
        # Lengths within the trained one are all alike; reading them costs one device synchronisation a step.
        lengths = self.lengths.clamp(min=self._trained)
        distinct = lengths.unique().tolist()
        result: tuple[Tensor, ...] | None = None
        single = False
        for length in distinct:
            rows = (lengths == length).nonzero()[:, 0]
            part = self._at_length(x, position_ids[:, rows], length, *args, **kwargs)
            single = isinstance(part, Tensor)
            parts = (part,) if isinstance(part, Tensor) else tuple(part)
            if result is None:
                result = tuple(p.new_empty(1, lengths.shape[0], *p.shape[2:]) for p in parts)
            for whole, piece in zip(result, parts, strict=True):
                whole[:, rows] = piece
        assert result is not None
        return result[0] if single else result

    def _at_length(self, x: Tensor, position_ids: Tensor, length: int, *args: Any, **kwargs: Any) -> Any:
        """The module's result for these rows, with frequencies for sequences of `length` tokens."""
        # A lower high-water mark than any length makes the library recompute the frequencies for exactly this one.
        for name in vars(self._module):
            if name.endswith("max_seq_len_cached"):
                setattr(self._module, name, 0)
        # One more row at the last position of such a sequence tells the library the length; it is dropped again.
        last = position_ids.new_full((1, 1), length - 1)
        part = self._forward(x, torch.cat([position_ids, last], dim=1), *args, **kwargs)
        return part[:, :-1] if isinstance(part, Tensor) else tuple(p[:, :-1] for p in part)


def install(model: nn.Module) -> list[PerSequenceRope]:
    """Put a `PerSequenceRope` before every rotary module of `model` that depends on the length; [] if none does."""
    wrappers = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        found = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if found & set(LENGTH_DEPENDENT) and hasattr(module, "config"):
            wrapper = PerSequenceRope(module)
            module.forward = wrapper
            wrappers.append(wrapper)
    return wrappers


def _trained_length(config: Any) -> int:
    """Positions up to which the plain (or short) frequencies hold; the least of a model's layer types."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    known = [value.get("original_max_position_embeddings") for value in nested if value.get("rope_type") == "longrope"]
    lengths = [length for length in known if length]
    return min(lengths, default=config.max_position_embeddings)
