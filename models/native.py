"""The native runner: lean modules for Llama, Mistral, Qwen2 and Qwen3 decoders and everything built like them.

A checkpoint's tensors are read one by one and copied straight into their place in the fused parameters, so that
memory never holds more than the model and one tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace
from torch import Tensor
from transformers import PretrainedConfig

from ..core.errors import ModelLoadError
from ..core.model_spec import ModelSpec
from ..kernels.decode_step_cpu import DecodeStepCPU, SlotTables
from .checkpoint import Checkpoint, TensorReader
from .context import AttentionContext
from .native_layers import ACTIVATIONS, Chain, Decoder, DecoderLayer, LayerShape, Linear, TokenWeights
from .placement import Placement
from .rope import RopeSettings, RotaryEmbedding, rope_settings
from .runner import ModelRunner, ProgressCallback

SHARES_EMBEDDING = "quire_shares_embedding"
"""Key of config.json: a draft has neither embedding nor head of its own, it uses those of its target."""
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture differs from the common decoder; each switch is read off its configuration."""

    qkv_bias: Callable[[PretrainedConfig], bool] = lambda config: False
    output_bias: Callable[[PretrainedConfig], bool] = lambda config: False
    mlp_bias: Callable[[PretrainedConfig], bool] = lambda config: False
    qk_norm: bool = False


def _attention_bias(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "attention_bias", False))


def _mlp_bias(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "mlp_bias", False))


NATIVE_ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_attention_bias, _attention_bias, _mlp_bias),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=lambda config: True),
    "Qwen3ForCausalLM": Family(_attention_bias, _attention_bias, qk_norm=True),
}


def native_obstacle(checkpoint: Checkpoint) -> str | None:
    """Why the native runner does not serve this checkpoint, or None if it does."""
    names = checkpoint.config.get("architectures") or ["an architecture that config.json does not name"]
    if names[0] not in NATIVE_ARCHITECTURES:
        return f"{names[0]} is not among its architectures ({', '.join(NATIVE_ARCHITECTURES)})"
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else "unnamed"
        return f"the checkpoint is quantized ({method}), and it computes with unquantized weights only"
    return None


class NativeRunner:
    """A decoder of our own modules; fulfils `ModelRunner`."""

    def __init__(self, spec: ModelSpec, decoder: Decoder, rotary: RotaryEmbedding) -> None:
        self.spec = spec
        self.decoder = decoder
        self.rotary = rotary

    @property
    def rope(self) -> RopeSettings | None:
        """See `ModelRunner.rope`."""
        return self.rotary.settings

    def output_weight(self, layer: int) -> Tensor | None:
        """See `ModelRunner.output_weight`."""
        return self.decoder.layers[layer].attention.output.weight

    def first(self, count: int) -> "NativeRunner":
        """A runner of the model's first `count` layers, then its norm and head; the weights are these."""
        spec = replace(self.spec, num_layers=count, windows=self.spec.windows[:count])
        return NativeRunner(spec, self.decoder.first(count), self.rotary)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        context: AttentionContext,
        logit_rows: Tensor,
    ) -> Tensor:
        """See `ModelRunner.forward`."""
        angles = self.rotary.angles(positions, lengths, self.decoder.embedding.dtype)
        return self.decoder(input_ids, angles, context, logit_rows)

    def chain(self, context: AttentionContext, depth: int) -> Chain | None:
        """What draws `depth` tokens of each sequence and computes them but for the last, as `forward` of one row per
        sequence would; the context's `positions` and `kept` are counted up. None where no kernel does it in one piece.
        """
        angles = self.rotary.table(context.positions, depth, self.decoder.embedding.dtype)
        return None if angles is None else self.decoder.chain(angles, context)

    def decode_step(self, tables: SlotTables, max_length: int) -> DecodeStepCPU | None:
        """What computes decodes of these slots, rotated to positions below `max_length`, as `forward` of one row each
        would; None where no kernel does it in one piece.
        """
        if not self.rotary.has_table(max_length):
            return None
        dtype = self.decoder.embedding.dtype
        return self.decoder.decode_step(tables, lambda count: self.rotary.first(count, dtype))


def native_widths(config: PretrainedConfig, spec: ModelSpec) -> dict[str, Any]:
    """Fields of `kernels.kernel_trials.KernelShape` that only our own layers have a use for."""
    return {
        "rotated": rope_settings(config.to_dict(), spec.head_dim).dim,
        "head_norm": NATIVE_ARCHITECTURES[spec.architecture].qk_norm,
        "hidden": config.hidden_size,
        "feed_forward": config.intermediate_size,
    }


def load_native(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    spec: ModelSpec,
    place: Placement,
    on_progress: ProgressCallback,
    target: ModelRunner | None = None,
) -> NativeRunner:
    """Build the decoder of `checkpoint` and fill it; `native_obstacle` must have said None.

    target: whose embedding and head a draft may share. Raises `ModelLoadError`, naming file and tensor, for missing,
    unexpected or misshapen tensors.
    """
    family = NATIVE_ARCHITECTURES[spec.architecture]
    settings = rope_settings(config.to_dict(), spec.head_dim)
    activation = config.hidden_act
    if activation not in ACTIVATIONS:
        raise ModelLoadError(f"{checkpoint.folder / 'config.json'}: unknown activation {activation!r}")
    if spec.num_heads % spec.num_kv_heads:
        raise ModelLoadError(
            f"{checkpoint.folder / 'config.json'}: {spec.num_heads} query heads do not divide among "
            f"{spec.num_kv_heads} kv heads"
        )
    shape = _layer_shape(config, spec, family)
    shared = bool(checkpoint.config.get(SHARES_EMBEDDING))
    if shared:
        tokens = _shared_tokens(checkpoint, spec, shape, place, target)
    else:
        tokens = TokenWeights.fresh(spec.vocab_size, shape.hidden, bool(config.tie_word_embeddings), place)
    decoder = Decoder(shape, ACTIVATIONS[activation], spec.windows, tokens, place)
    _fill(checkpoint, dict(_destinations(decoder, shape, shared)), on_progress)
    for layer in decoder.layers:
        layer.attention.share_norm_weights()
    return NativeRunner(spec, decoder, RotaryEmbedding(settings, place.device))


def _layer_shape(config: PretrainedConfig, spec: ModelSpec, family: Family) -> LayerShape:
    return LayerShape(
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        norm_epsilon=config.rms_norm_eps,
        qkv_bias=family.qkv_bias(config),
        output_bias=family.output_bias(config),
        mlp_bias=family.mlp_bias(config),
        qk_norm=family.qk_norm,
    )


def _shared_tokens(
    checkpoint: Checkpoint, spec: ModelSpec, shape: LayerShape, place: Placement, target: ModelRunner | None
) -> TokenWeights:
    """The target's embedding and head; raises `ModelLoadError` where there are none that fit."""
    if not isinstance(target, NativeRunner):
        what = "it can only be served as a draft" if target is None else "the target is not on the native runner"
        raise ModelLoadError(f"{checkpoint.name} shares the embedding of its target: {what}")
    shared = TokenWeights(target.decoder.embedding, target.decoder.head)
    needed = (spec.vocab_size, shape.hidden)
    for tensor in (shared.embedding, shared.head):
        if tensor.shape != needed or tensor.dtype != place.dtype:
            raise ModelLoadError(
                f"{checkpoint.name} shares the embedding of its target and needs {list(needed)} in {place.dtype}, "
                f"{target.spec.name} has {list(tensor.shape)} in {tensor.dtype}"
            )
    return shared


def _destinations(decoder: Decoder, shape: LayerShape, shared: bool) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensor name -> the view of a parameter it is copied into; without embedding and head if shared."""
    if not shared:
        yield "model.embed_tokens.weight", decoder.embedding
        if decoder.head is not decoder.embedding:
            yield "lm_head.weight", decoder.head
    yield "model.norm.weight", decoder.norm.weight
    for index, layer in enumerate(decoder.layers):
        for name, view in _layer_destinations(layer, shape):
            yield f"model.layers.{index}.{name}", view


def _layer_destinations(layer: DecoderLayer, shape: LayerShape) -> Iterator[tuple[str, Tensor]]:
    yield "input_layernorm.weight", layer.attention_norm.weight
    yield "post_attention_layernorm.weight", layer.mlp_norm.weight
    kv_rows = shape.num_kv_heads * shape.head_dim
    parts = {"q_proj": shape.num_heads * shape.head_dim, "k_proj": kv_rows, "v_proj": kv_rows}
    yield from _linear_destinations("self_attn.", layer.attention.qkv, parts)
    yield from _linear_destinations("self_attn.", layer.attention.output, {"o_proj": shape.hidden})
    halves = {"gate_proj": shape.feed_forward, "up_proj": shape.feed_forward}
    yield from _linear_destinations("mlp.", layer.mlp.gate_up, halves)
    yield from _linear_destinations("mlp.", layer.mlp.down, {"down_proj": shape.hidden})
    if layer.attention.qk_weight is not None:
        query, key = layer.attention.qk_weight.split([shape.num_heads, shape.num_kv_heads])
        # The checkpoint holds one head's weight; `share_norm_weights` hands it to the others.
        yield "self_attn.q_norm.weight", query[0]
        yield "self_attn.k_norm.weight", key[0]


def _linear_destinations(prefix: str, linear: Linear, parts: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The separate projections (name -> rows) that are stacked in `linear`."""
    for name, view in zip(parts, linear.weight.split(list(parts.values())), strict=True):
        yield f"{prefix}{name}.weight", view
    if linear.bias is not None:
        for name, view in zip(parts, linear.bias.split(list(parts.values())), strict=True):
            yield f"{prefix}{name}.bias", view


def _fill(checkpoint: Checkpoint, destinations: dict[str, Tensor], on_progress: ProgressCallback) -> None:
    """Copy every tensor to its destination, after checking that the two sets and all shapes agree."""
    _check_tensors(checkpoint, destinations)
    reader = TensorReader(checkpoint, on_progress)
    try:
        # File by file, in the order of the file, so that a cold disk is read once from front to back.
        for name, entry in checkpoint.tensors.items():
            if name in destinations:
                destinations[name].copy_(reader.read(name))
            else:
                reader.skip(entry)
    finally:
        reader.close()


def _check_tensors(checkpoint: Checkpoint, destinations: dict[str, Tensor]) -> None:
    """Raise `ModelLoadError` for the first missing, unexpected or misshapen tensor."""
    architecture = checkpoint.config["architectures"][0]
    missing = [name for name in destinations if name not in checkpoint.tensors]
    if missing:
        raise ModelLoadError(f"{checkpoint.folder} lacks the tensor {missing[0]} ({len(missing)} missing in all)")
    for name, entry in checkpoint.tensors.items():
        if name not in destinations:
            # A tied head may be stored all the same; it is the embedding once more.
            if name == "lm_head.weight" or name.endswith(_IGNORED_SUFFIXES):
                continue
            raise ModelLoadError(f"{entry.file} holds the tensor {name}, which {architecture} does not have")
        expected = tuple(destinations[name].shape)
        if entry.shape != expected:
            raise ModelLoadError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(expected)}"
            )
        if not entry.is_float:
            raise ModelLoadError(f"{entry.file}: tensor {name} is stored as {entry.dtype}, not as floating point")
