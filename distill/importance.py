"""Which parts of a decoder matter, by what they do to the hidden states of a few calibration texts.

Layers: block influence BI = 1 - mean cosine of a layer's input and output (ShortGPT, Men et al. 2024, section 3.2).
Neurons of a gated feed-forward and attention heads: mean square of what each adds to the residual stream, its
activation times the norm of its column (after Minitron, Muralidharan et al. 2024, section 2.2, which ranks by
activations alone). Channels of the hidden state: their share of the mean square behind any of the draft's norms.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelLoadError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model; raises `ModelLoadError` where they cannot be told."""
    config: Any = model.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelLoadError(f"{type(model).__name__} has no list of its {count} layers: no draft can be cut out of it")


@torch.inference_mode()
def layer_importance(model: nn.Module, rows: Sequence[Tensor]) -> list[float]:
    """Block influence of each layer over rows of ids [1, T]; 0 for a layer that changes no direction."""
    layers = decoder_layers(model)
    cosines, tokens = [0.0] * len(layers), 0

    def watch(index: int, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = (inputs[0] if inputs else kwargs["hidden_states"]).float()
        after = (output[0] if isinstance(output, tuple) else output).float()
        cosines[index] += nn.functional.cosine_similarity(before, after, dim=-1).sum().item()

    with _hooked(layers, watch):
        for row in rows:
            model(input_ids=row, use_cache=False)
            tokens += row.numel()
    return [1.0 - cosine / tokens for cosine in cosines]


@torch.inference_mode()
def input_importance(model: nn.Module, rows: Sequence[Tensor], downs: Sequence[nn.Linear]) -> list[Tensor]:
    """Mean square contribution [F] of each input of the model's linear maps `downs`, over rows of ids [1, T]."""
    sums = [torch.zeros(down.in_features, device=down.weight.device) for down in downs]

    def watch(index: int, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sums[index] += inputs[0].float().square().flatten(0, -2).sum(0)

    with _hooked(downs, watch):
        for row in rows:
            model(input_ids=row, use_cache=False)
    tokens = sum(row.numel() for row in rows)
    norms = [down.weight.float().square().sum(0) for down in downs]
    return [total / tokens * norm for total, norm in zip(sums, norms, strict=True)]


@torch.inference_mode()
def channel_importance(model: nn.Module, rows: Sequence[Tensor], layers: Sequence[nn.Module]) -> Tensor:
    """Largest share [H] that each channel has of what a norm on the residual stream hands out, of the norms in these
    decoder layers and those behind all layers; mean squares over rows of ids [1, T].

    Minitron, section 2.2, sums over all norms. But a layer may live on channels that are silent before the others, and
    norms hand out sums of very different size, so each norm counts by itself, and only where the draft has it.
    """
    config: Any = model.config
    hidden = config.get_text_config(decoder=True).hidden_size
    kept = {id(layer) for layer in layers}
    others = {id(m) for layer in decoder_layers(model) if id(layer) not in kept for m in layer.modules()}
    norms = [
        module
        for name, module in model.named_modules()
        if name.endswith("norm") and module.weight.shape == (hidden,) and id(module) not in others
    ]
    sums = [torch.zeros(hidden, device=norms[0].weight.device) for _ in norms]

    def watch(index: int, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sums[index] += output.float().square().flatten(0, -2).sum(0)

    with _hooked(norms, watch):
        for row in rows:
            model(input_ids=row, use_cache=False)
    return torch.stack([total / total.sum() for total in sums]).amax(0)


def gated_mlp(layer: nn.Module) -> tuple[str, nn.Linear]:
    """The name within a decoder layer of its gated feed-forward, and its down projection.

    Raises `ModelLoadError` if there is none.
    """
    for name, module in layer.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Linear) and hasattr(module, "gate_proj") and hasattr(module, "up_proj"):
            return name, down
    raise ModelLoadError("only a gated feed-forward (gate_proj, up_proj, down_proj) can be made narrower")


def head_projections(layer: nn.Module) -> tuple[str, nn.Linear]:
    """The name within a decoder layer of its attention, and the projection out of its heads.

    Raises `ModelLoadError` if there is none with a projection for each of queries, keys and values.
    """
    for name, module in layer.named_modules():
        out = getattr(module, "o_proj", None)
        if isinstance(out, nn.Linear) and all(hasattr(module, part) for part in ("q_proj", "k_proj", "v_proj")):
            return name, out
    raise ModelLoadError("only attention with q_proj, k_proj, v_proj and o_proj can have fewer heads")


@contextmanager
def _hooked(modules: Iterable[nn.Module], watch: Any) -> Iterator[None]:
    """Call `watch(index, inputs, kwargs, output)` after each forward pass of each module."""

    def hook(index: int) -> Any:
        return lambda module, inputs, kwargs, output: watch(index, inputs, kwargs, output)

    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
