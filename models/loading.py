"""Loading a model: from a folder or hub name to a `ModelRunner`."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..core.errors import ConfigError, ModelLoadError
from ..core.model_spec import ModelSpec
from ..kernels.kernel_trials import KernelShape
from .checkpoint import Checkpoint, open_checkpoint
from .native import SHARES_EMBEDDING, NativeRunner, load_native, native_obstacle, native_widths
from .placement import Placement
from .runner import ModelRunner, ProgressCallback
from .spec import load_config, model_spec


def checkpoint_dtype(model: str) -> torch.dtype:
    """The floating-point type that the checkpoint's weights are meant for; raises `ModelLoadError` as loading does."""
    return open_checkpoint(model).dtype


def kernel_shape(
    model: str, *, runner: Literal["auto", "native", "transformers"], trust_remote_code: bool, page_size: int
) -> KernelShape:
    """What kernels `load_runner` would need for a model, by its configuration; raises `ModelLoadError` as it does.

    The library's own modelling code may bring sinks without saying so beforehand: for it they are always among them.
    """
    checkpoint = open_checkpoint(model, with_code=trust_remote_code)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    spec = _read_spec(checkpoint, config)
    text = config.get_text_config(decoder=True)
    common = KernelShape(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=page_size,
        vocab_size=spec.vocab_size,
        windows=tuple(dict.fromkeys(spec.windows)),
        softcap=getattr(text, "attn_logit_softcapping", None),
    )
    if runner == "transformers" or native_obstacle(checkpoint) is not None:
        return replace(common, sinks=True)
    return replace(common, **native_widths(config, spec))


def load_runner(
    model: str,
    *,
    place: Placement,
    runner: Literal["auto", "native", "transformers"],
    trust_remote_code: bool,
    on_progress: ProgressCallback,
    target: ModelRunner | None = None,
) -> ModelRunner:
    """Load `model`, a checkpoint folder or hub name; as a draft for `target` it may use that one's embedding.

    auto takes the native runner where it knows the architecture, else transformers. Raises `ModelLoadError` where the
    checkpoint is broken or cannot be served, `ConfigError` where the native runner was asked for and does not fit.
    """
    checkpoint = open_checkpoint(model, with_code=trust_remote_code)
    obstacle = native_obstacle(checkpoint)
    if runner == "native" and obstacle is not None:
        raise ConfigError(f"the native runner does not serve {model}: {obstacle}", param="runner")
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    spec = _read_spec(checkpoint, config)
    if runner != "transformers" and obstacle is None:
        return load_native(checkpoint, config, spec, place, on_progress, target)
    if checkpoint.config.get(SHARES_EMBEDDING):
        raise ModelLoadError(f"{model} shares its target's embedding, which takes the native runner: {obstacle}")
    from .transformers_runner import load_transformers  # the library's modelling code takes two seconds to import

    return load_transformers(checkpoint, config, spec, place, on_progress, trust_remote_code=trust_remote_code)


def weight_bytes(runner: ModelRunner, target: ModelRunner | None = None) -> int:
    """Bytes of the model's weights, those aside that it shares with `target`."""
    shared = {tensor.data_ptr() for tensor in _parameters(target)} if target is not None else set()
    return sum(w.numel() * w.itemsize for w in _parameters(runner) if w.data_ptr() not in shared)


def _parameters(runner: ModelRunner) -> Iterable[Tensor]:
    if isinstance(runner, NativeRunner):
        return runner.decoder.parameters()
    from .transformers_runner import TransformersRunner

    return runner.model.parameters() if isinstance(runner, TransformersRunner) else ()


def _read_spec(checkpoint: Checkpoint, config: PretrainedConfig) -> ModelSpec:
    """`model_spec`, with what configuration classes of some architectures raise on plain questions explained."""
    try:
        return model_spec(checkpoint, config)
    except ModelLoadError:
        raise
    # Configurations whose layers differ in shape refuse to name one head width, each by an error of its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        what = "its configuration does not describe one cache for all layers"
        raise ModelLoadError(f"{checkpoint.name}: {what}: {reason}") from error
