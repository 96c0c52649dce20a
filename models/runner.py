"""The protocol that both runners (native and transformers) fulfil; `models.loading` chooses and loads one."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..core.model_spec import ModelSpec
from .context import AttentionContext
from .rope import RopeSettings

ProgressCallback = Callable[[str, int, int], None]
"""Called with (phase, done, total) while weights load."""


class ModelRunner(Protocol):
    """Runs a decoder over a flattened ragged batch; owns the weights, nothing of the cache."""

    spec: ModelSpec

    @property
    def rope(self) -> RopeSettings | None:
        """How queries and keys are rotated (half-split layout); None where that is not known."""
        ...

    def output_weight(self, layer: int) -> Tensor | None:
        """The output projection of a layer's attention, [hidden, H * D]; None where it is not known."""
        ...

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        context: AttentionContext,
        logit_rows: Tensor,
    ) -> Tensor:
        """Compute the batch, storing its keys and values through `context.attend`, once per layer.

        input_ids [T] int64; positions [T] int64: what queries and keys are rotated to, or the model embeds;
        lengths [T] int64: the most of them that the row's sequence can reach (fixes length-dependent RoPE scaling per
        sequence); logit_rows [R] int64: rows whose logits are wanted.
        Returns logits [R, V] float32.
        """
        ...
