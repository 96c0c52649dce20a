"""Where the engine computes, in which floating-point type and by which kernels, from the operator's settings.

On a CPU, torch's own default number of threads is used (one per physical core, or `OMP_NUM_THREADS`).
"""

import logging

import torch

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from ..kernels.backend import resolve_backend
from ..models.loading import checkpoint_dtype
from ..models.placement import Placement

log = logging.getLogger("quire")


def choose_placement(config: EngineConfig) -> Placement:
    """What the settings say; auto: a GPU if there is one, and the checkpoint's type where the device computes it.

    Raises `ConfigError` if the device is not there or the kernels asked for cannot compute on it, `ModelLoadError` if
    there is no checkpoint to ask for its type.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device is cuda, but torch finds no CUDA device", param="device")
    device = torch.device("cuda" if config.device != "cpu" and available else "cpu")
    dtype = _dtype(config, device)
    try:
        return Placement(device, dtype, resolve_backend(device, dtype, config.attention_backend))
    except ValueError as error:
        raise ConfigError(str(error), param="attention_backend") from error


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The type of the setting; by default the checkpoint's own, on a CPU only bfloat16 and only where it is native."""
    if config.dtype != "auto":
        if config.dtype == "float16" and device.type == "cpu":
            log.warning("float16 on a CPU is slow; bfloat16 or float32 are better")
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    dtype = checkpoint_dtype(config.model)
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type == "cuda":
        return dtype
    return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32


def _cpu_computes_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere it is emulated and slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
