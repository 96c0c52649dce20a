"""Loading a model: from a folder or hub name to a `ModelRunner`."""

from typing import Literal

import torch
from transformers import PretrainedConfig

from ..core.errors import ConfigError, ModelLoadError
from ..core.model_spec import ModelSpec
from .checkpoint import Checkpoint, open_checkpoint
from .native import load_native, native_obstacle
from .placement import Placement
from .runner import ModelRunner, ProgressCallback
from .spec import load_config, model_spec


def checkpoint_dtype(model: str) -> torch.dtype:
    """The floating-point type that the checkpoint's weights are meant for; raises `ModelLoadError` as loading does."""
    return open_checkpoint(model).dtype


def load_runner(
    model: str,
    *,
    place: Placement,
    runner: Literal["auto", "native", "transformers"],
    trust_remote_code: bool,
    on_progress: ProgressCallback,
) -> ModelRunner:
    """Load `model`, a checkpoint folder or hub name.

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
        return load_native(checkpoint, config, spec, place, on_progress)
    from .transformers_runner import load_transformers  # the library's modelling code takes two seconds to import

    return load_transformers(checkpoint, config, spec, place, on_progress, trust_remote_code=trust_remote_code)


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
