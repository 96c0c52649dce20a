"""`ModelSpec` from a checkpoint's configuration: what scheduler, engine and server need to know of a model."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..core.errors import ModelLoadError
from ..core.model_spec import ModelSpec
from .checkpoint import Checkpoint, read_json
from .rope import LENGTH_DEPENDENT

logger = logging.getLogger("quire")

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
_UNKNOWN_CONTEXT = 2048
_FULL = "full_attention"
_SLIDING = "sliding_attention"


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool) -> PretrainedConfig:
    """The checkpoint's configuration as transformers reads it, checked for what no runner can serve.

    Raises `ModelLoadError` for a model type that transformers does not know, a configuration it rejects, code in the
    checkpoint that was not allowed to run, and models that are not causal decoders.
    """
    raw = checkpoint.config
    needs_code = "AutoConfig" in (raw.get("auto_map") or {}) and raw.get("model_type") not in _known_types()
    if needs_code and not trust_remote_code:
        raise ModelLoadError(
            f"{checkpoint.name} ({_architecture(raw)}) needs Python code from the checkpoint; "
            "allow it with trust_remote_code if you trust its author"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    # Anything may come out of configuration classes: KeyError, TypeError, validation errors of the hub library.
    except Exception as error:
        raise ModelLoadError(_config_reason(checkpoint, error)) from error
    _check_causal(checkpoint, config, allow_unknown=trust_remote_code)
    return config


def model_spec(checkpoint: Checkpoint, config: PretrainedConfig) -> ModelSpec:
    """The spec of `config`; raises `ModelLoadError` where a number that every decoder has is missing."""
    text = config.get_text_config(decoder=True)
    num_layers, num_heads, hidden = (
        _number(checkpoint, text, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    num_kv_heads = getattr(text, "num_key_value_heads", None) or (
        1 if getattr(text, "multi_query", False) else num_heads
    )
    return ModelSpec(
        name=checkpoint.name,
        architecture=_architecture(checkpoint.config),
        num_layers=num_layers,
        num_kv_heads=int(num_kv_heads),
        num_heads=num_heads,
        head_dim=int(getattr(text, "head_dim", None) or hidden // num_heads),
        vocab_size=_number(checkpoint, text, "vocab_size"),
        max_context=max_context(text),
        windows=attention_windows(checkpoint, text, num_layers),
        eos_token_ids=_eos_token_ids(checkpoint, config),
        rope_length=rope_length(text),
    )


def attention_windows(checkpoint: Checkpoint, config: PretrainedConfig, num_layers: int) -> tuple[int | None, ...]:
    """Per layer the sliding window in tokens, None for full attention.

    Raises `ModelLoadError` for kinds of layers that are not causal attention over a KV cache (linear attention,
    convolutions, state spaces, chunks).
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or not window:
        window = None
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * num_layers
    for kind in kinds:
        if kind not in (_FULL, _SLIDING):
            raise ModelLoadError(
                f"{checkpoint.name} ({_architecture(checkpoint.config)}) has layers of kind {kind!r}, "
                "which do not fit a paged KV cache"
            )
    if len(kinds) < num_layers:
        raise ModelLoadError(
            f"{checkpoint.folder / 'config.json'}: layer_types lists {len(kinds)} of {num_layers} layers"
        )
    return tuple(window if kind == _SLIDING else None for kind in kinds[:num_layers])


def max_context(config: PretrainedConfig) -> int:
    """Positions the model was trained for, stretching by dynamic or YaRN scaling included.

    Linear scaling is not multiplied in: whether `max_position_embeddings` already counts it differs from checkpoint
    to checkpoint, and too small a number is only a default that the operator can raise.
    """
    longest = max((int(getattr(config, key, None) or 0) for key in _CONTEXT_KEYS), default=0)
    if not longest:
        logger.warning("the configuration names no context length; assuming %d tokens", _UNKNOWN_CONTEXT)
        return _UNKNOWN_CONTEXT
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") == "dynamic":
        return int(longest * factor)
    if rope.get("rope_type") == "yarn":
        return max(longest, int((rope.get("original_max_position_embeddings") or longest) * factor))
    return longest


def rope_length(config: PretrainedConfig) -> int | None:
    """Tokens up to which keys are rotated alike whatever a sequence's length; None where they always are.

    Rounded down where a configuration names several lengths.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    if not any(value.get("rope_type") in LENGTH_DEPENDENT for value in nested):
        return None
    keys = ("max_position_embeddings", "original_max_position_embeddings")
    lengths = [level.get(key) for level in (config.to_dict(), *nested) for key in keys]
    return min((int(length) for length in lengths if length), default=1)


def _known_types() -> set[str]:
    """Model types with a causal language model in the installed transformers."""
    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _architecture(raw: dict[str, Any]) -> str:
    """The class that config.json names, else its model type."""
    names = raw.get("architectures") or []
    return str(names[0]) if names else str(raw.get("model_type") or "unknown architecture")


def _config_reason(checkpoint: Checkpoint, error: Exception) -> str:
    """One line on why transformers rejected the configuration."""
    model_type = checkpoint.config.get("model_type")
    if model_type not in _known_types() and isinstance(error, ValueError | KeyError):
        return (
            f"{checkpoint.name}: unknown architecture {_architecture(checkpoint.config)} (model type {model_type!r}): "
            "neither Quire nor the installed transformers knows it"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{checkpoint.folder / 'config.json'} is rejected: {' '.join(lines)[:400] or type(error).__name__}"


def _check_causal(checkpoint: Checkpoint, config: PretrainedConfig, *, allow_unknown: bool) -> None:
    """Refuse encoder-decoders, encoders, and classes that are not causal language models."""
    architecture = _architecture(checkpoint.config)
    refusal = f"{checkpoint.name} ({architecture}) cannot be served: "
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(f"{refusal}it is an encoder-decoder, not a causal decoder")
    if config.model_type not in _known_types():
        if allow_unknown and "AutoModelForCausalLM" in (checkpoint.config.get("auto_map") or {}):
            return
        raise ModelLoadError(
            f"{checkpoint.name}: {architecture} (model type {config.model_type!r}) is not a causal language model "
            "that the installed transformers can generate with"
        )
    known = _causal_classes()
    for name in checkpoint.config.get("architectures") or []:
        if name not in known and not allow_unknown:
            raise ModelLoadError(f"{refusal}{name} is not a causal language model")
    text = config.get_text_config(decoder=True)
    if getattr(text, "use_bidirectional_attention", False) not in (False, None, "vision"):
        raise ModelLoadError(f"{refusal}it attends in both directions, it is not a causal decoder")


def _causal_classes() -> set[str]:
    """Names of the causal language model classes of the installed transformers."""
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return names


def _number(checkpoint: Checkpoint, config: PretrainedConfig, key: str) -> int:
    """A positive whole number of the configuration; raises `ModelLoadError` naming it otherwise."""
    value = getattr(config, key, None)
    if value is None:
        raise ModelLoadError(
            f"{checkpoint.name} ({_architecture(checkpoint.config)}): its configuration has no {key}; "
            "it is not a decoder that attends over a KV cache"
        )
    if not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"{checkpoint.folder / 'config.json'}: {key} must be a positive number, got {value!r}")
    return value


def _eos_token_ids(checkpoint: Checkpoint, config: PretrainedConfig) -> tuple[int, ...]:
    """End tokens of generation_config.json, else of the configuration, in their order."""
    generation = checkpoint.folder / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    if found is None:
        return ()
    ids = found if isinstance(found, list | tuple) else [found]
    return tuple(dict.fromkeys(int(token) for token in ids))
