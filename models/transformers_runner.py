"""Any other decoder: the library's own modelling code, with our paged attention behind its `AttentionInterface`.

The flattened batch goes in as one sequence whose `position_ids` restart; without a cache and without a mask. The
attention function is the only place where rows meet, so it alone decides who sees whom. The step's
`AttentionContext` reaches it as the extra keyword argument `quire_context`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as library_logging

from ..core.errors import ModelLoadError
from ..core.model_spec import ModelSpec
from . import length_rope
from .anatomy import half_split_rope, output_projections
from .checkpoint import Checkpoint
from .context import AttentionContext
from .placement import Placement
from .probe import AttentionCall, DenseContext, logits_agree
from .runner import ProgressCallback

ATTENTION_NAME = "quire_paged"
_PROBE_LENGTHS = (7, 5)


class _UnsupportedAttentionError(Exception):
    """A layer asks for something that paged attention does not do."""


class TransformersRunner:
    """A library model on our paged attention; fulfils `ModelRunner`."""

    def __init__(self, spec: ModelSpec, model: PreTrainedModel) -> None:
        self.spec = spec
        self.model = model
        self._ropes = length_rope.install(model)
        self.rope = half_split_rope(model, spec.head_dim)
        """See `ModelRunner.rope`."""
        self._outputs = output_projections(model)

    def output_weight(self, layer: int) -> Tensor | None:
        """See `ModelRunner.output_weight`."""
        return self._outputs.get(layer)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        context: AttentionContext,
        logit_rows: Tensor,
    ) -> Tensor:
        """See `ModelRunner.forward`."""
        for rope in self._ropes:
            rope.lengths = lengths
        try:
            output = self.model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                attention_mask=None,
                use_cache=False,
                logits_to_keep=logit_rows,
                quire_context=context,
                quire_windows=self.spec.windows,
            )
        finally:
            for rope in self._ropes:
                rope.lengths = None
        logits: Tensor = output.logits[0]
        assert logits.shape[0] == logit_rows.shape[0]
        return logits.float()


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    quire_context: AttentionContext | None = None,
    quire_windows: tuple[int | None, ...] = (),
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's attention function: query [1, H, T, D], key [1, K, T, D], value [1, K, T, Dv] -> [1, T, H, Dv].

    Of the other options that models pass, `softcap` and `s_aux` (attention sinks) are honoured; the window is the
    spec's for the layer, because it also decides which pages are given back.
    """
    layer = int(cast(Any, module).layer_idx)
    window = quire_windows[layer] if layer < len(quire_windows) else None
    _refuse_foreign(module, attention_mask, layer, window, options)
    if quire_context is None:
        raise _UnsupportedAttentionError("its layers do not hand keyword arguments on to the attention function")
    query, key, value = (rows[0].transpose(0, 1) for rows in (query, key, value))
    width = query.shape[-1]
    stored = quire_context.pool.shape[-1] if isinstance(quire_context, AttentionContext) else width
    if width < stored:
        # Zeros change no score; they fill the page where layers, or keys and values, differ in width.
        query, key = pad(query, (0, stored - width)), pad(key, (0, stored - width))
    mixed = quire_context.attend(
        layer,
        query,
        key,
        value,
        scale=width**-0.5 if scaling is None else scaling,
        window=window,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    return mixed[None], None


def _refuse_foreign(
    module: nn.Module, attention_mask: Tensor | None, layer: int, window: int | None, options: dict[str, Any]
) -> None:
    """Raise where a layer asks for what paged attention does not do; being fixed, the probe at start finds it."""
    if attention_mask is not None:
        raise _UnsupportedAttentionError("its attention layers bring a mask or bias of their own")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise _UnsupportedAttentionError("its attention is not causal")
    if "sliding_window" in options and (options["sliding_window"] or None) != window:
        raise _UnsupportedAttentionError(
            f"layer {layer} passes a window of {options['sliding_window']} tokens, the configuration says {window}"
        )


def load_transformers(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    spec: ModelSpec,
    place: Placement,
    on_progress: ProgressCallback,
    *,
    trust_remote_code: bool,
) -> TransformersRunner:
    """Load the library's model and check that paged attention serves it.

    The spec's heads, widths and vocabulary are replaced by those measured. Raises `ModelLoadError` with the reason
    where a tensor is missing or misshapen, or the model does not compute the same over a flattened batch.
    """
    on_progress("loading weights", 0, checkpoint.num_bytes)
    model = _load_model(checkpoint, config, place, trust_remote_code)
    on_progress("loading weights", checkpoint.num_bytes, checkpoint.num_bytes)
    with _explained(spec, "cannot be served over a flattened batch without a mask"):
        return _verified(spec, model, place)


def _load_model(
    checkpoint: Checkpoint, config: PretrainedConfig, place: Placement, trust_remote_code: bool
) -> PreTrainedModel:
    """The library's model on its device, frozen, every weight filled from the checkpoint."""
    AttentionInterface.register(ATTENTION_NAME, cast(Any, paged_attention_forward))
    with _quiet_library(), _explained_load(checkpoint):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=place.dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(kind) or ())
        if names:
            wrong = "lacks the tensor" if kind == "missing_keys" else "has the wrong shape for"
            raise ModelLoadError(f"{checkpoint.folder} {wrong} {names[0]} ({len(names)} in all)")
    return cast(PreTrainedModel, model.to(place.device).requires_grad_(False).eval())


@contextlib.contextmanager
def _explained_load(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever the library raises while loading becomes a `ModelLoadError` of one line."""
    try:
        yield
    # Each architecture, quantizer and remote code raises its own kinds.
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (ATTENTION_NAME,):
            reason = "it chooses among attention functions of its own and does not call the registered attention"
        else:
            reason = f"transformers cannot load it: {_one_line(error)}"
        raise ModelLoadError(f"{checkpoint.name} cannot be served: {reason}") from error


@contextlib.contextmanager
def _explained(spec: ModelSpec, what: str) -> Iterator[None]:
    """Whatever a model's code raises on the probe becomes a `ModelLoadError` of one line."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{spec.name} ({spec.architecture}) {what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, _UnsupportedAttentionError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """No progress bars and load reports of the library: ours are shown."""
    had_bars, verbosity = library_logging.is_progress_bar_enabled(), library_logging.get_verbosity()
    library_logging.disable_progress_bar()
    library_logging.set_verbosity_error()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if had_bars:
            library_logging.enable_progress_bar()


@torch.inference_mode()
def _verified(spec: ModelSpec, model: PreTrainedModel, place: Placement) -> TransformersRunner:
    """The runner, after a probe of two sequences; raises `ModelLoadError` where it is not served rightly."""
    runner = TransformersRunner(spec, model)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(spec.vocab_size, (n,), generator=generator) for n in _PROBE_LENGTHS)
    context = DenseContext()
    # The second sequence comes in two steps: a model that carries state beside our cache loses it here.
    half = len(second) // 2
    whole = _probe_step(runner, context, place, {0: (first, 0), 1: (second[:half], 0)})
    runner.spec = _measured_spec(spec, context.calls, vocab_size=whole.shape[1])
    rest = _probe_step(runner, context, place, {1: (second[half:], half)})
    logits = torch.stack([whole[0], rest[0]])
    if not logits_agree(logits, _eager_logits(model, place, (first, second)), place.dtype):
        raise ModelLoadError(
            f"{spec.name} ({spec.architecture}) cannot be served: over a flattened batch it does not give the logits "
            "of its own attention"
        )
    return runner


def _probe_step(
    runner: TransformersRunner, context: DenseContext, place: Placement, chunks: dict[int, tuple[Tensor, int]]
) -> Tensor:
    """Last logits [S, V] of one step; `chunks`: sequence -> its new tokens and the position of the first."""
    context.sequences = list(chunks)
    context.query_lengths = [len(ids) for ids, _ in chunks.values()]
    ids = torch.cat([ids for ids, _ in chunks.values()]).to(place.device)
    positions = torch.cat([torch.arange(start, start + len(ids)) for ids, start in chunks.values()]).to(place.device)
    last = torch.tensor(context.query_lengths, device=place.device).cumsum(0) - 1
    reached = torch.full_like(positions, max(_PROBE_LENGTHS))
    # The stand-in has the one method that the attention function uses.
    return runner.forward(ids, positions, reached, cast(AttentionContext, context), last)


def _eager_logits(model: PreTrainedModel, place: Placement, sequences: tuple[Tensor, ...]) -> Tensor:
    """Last logits [S, V] of the sequences, each alone, by the library's own attention."""
    model.set_attn_implementation("eager")
    try:
        outputs = [model(input_ids=ids[None].to(place.device), use_cache=False) for ids in sequences]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return torch.stack([output.logits[0, -1].float() for output in outputs])


def _measured_spec(spec: ModelSpec, calls: list[AttentionCall], vocab_size: int) -> ModelSpec:
    """The spec with what the layers really passed; raises `ModelLoadError` where they do not fit one cache."""
    seen = sorted(call.layer for call in calls)
    refusal = f"{spec.name} ({spec.architecture}) cannot be served: "
    if seen != list(range(spec.num_layers)):
        raise ModelLoadError(
            f"{refusal}its {spec.num_layers} layers must each call the registered attention function once, "
            f"but {len(set(seen))} did, in {len(seen)} calls"
        )
    if len({(call.num_heads, call.num_kv_heads) for call in calls}) > 1:
        raise ModelLoadError(f"{refusal}its layers differ in their number of heads")
    return msgspec.structs.replace(
        spec,
        num_heads=calls[0].num_heads,
        num_kv_heads=calls[0].num_kv_heads,
        head_dim=max(max(call.head_dim, call.value_dim) for call in calls),
        vocab_size=vocab_size,
    )
