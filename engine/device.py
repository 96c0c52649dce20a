"""Where the engine computes, in which floating-point type and by which kernels, from the operator's settings.

On a CPU, torch's own default number of threads is used (one per physical core, or `OMP_NUM_THREADS`).
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from ..core.config import EngineConfig
from ..core.errors import ConfigError, ModelLoadError
from ..kernels.backend import TRITON_BACKENDS, resolve_backend
from ..kernels.kernel_trials import TRIALS, KernelShape
from ..kernels.self_check import KernelFailure, failed_kernel
from ..models.loading import checkpoint_dtype, kernel_shape
from ..models.placement import Placement
from ..speculation.loading import chosen_draft

log = logging.getLogger("quire")


def choose_placement(config: EngineConfig) -> Placement:
    """What the settings say; auto: a GPU if there is one, and the checkpoint's type where the device computes it.

    Triton kernels must pass `trusted`. Raises `ConfigError` if the device is not there or the kernels asked for cannot
    compute on it, `ModelLoadError` if there is no checkpoint to ask for its type and shapes.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device is cuda, but torch finds no CUDA device", param="device")
    device = torch.device("cuda" if config.device != "cpu" and available else "cpu")
    dtype = _dtype(config, device)
    try:
        place = Placement(device, dtype, resolve_backend(device, dtype, config.attention_backend))
    except ValueError as error:
        raise ConfigError(str(error), param="attention_backend") from error
    return trusted(place, config) if place.backend in TRITON_BACKENDS else place


def trusted(place: Placement, config: EngineConfig) -> Placement:
    """The placement, if its Triton kernels give what plain torch gives for the shapes of the model and of its draft.

    If not, plain torch computes instead, with one warning; a backend that was asked for by name raises `ConfigError`,
    and so does a kernel that leaves the device unusable.
    """
    started = time.perf_counter()
    failures = (failed_kernel(shape, place.device, place.dtype, place.backend) for shape in _shapes(config))
    failure = next((found for found in failures if found is not None), None)
    if place.device.type == "cuda":
        torch.cuda.empty_cache()  # the cache is sized by what is free
    if failure is None:
        spent = time.perf_counter() - started
        log.info("kernels: %s (%d kinds checked against plain torch in %.1f s)", place.backend, len(TRIALS), spent)
        return place
    if failure.fatal or config.attention_backend != "auto":
        raise ConfigError(_reason(failure), param="attention_backend")
    log.warning("kernels: plain torch, which is slower: %s", _reason(failure))
    return replace(place, backend="reference")


def _reason(failure: KernelFailure) -> str:
    """For people."""
    what = f"Quire's Triton kernel for {failure.kernel} {failure.reason}"
    return f"{what}; the GPU cannot be used any more, start with attention_backend reference" if failure.fatal else what


def _shapes(config: EngineConfig) -> Iterator[KernelShape]:
    """Of the model, then of a draft model with another."""
    shape_of = partial(kernel_shape, trust_remote_code=config.trust_remote_code, page_size=config.page_size)
    yield (own := shape_of(config.model, runner=config.runner))
    draft = chosen_draft(config).model
    if draft:
        try:
            other = shape_of(draft, runner="auto")
        except ModelLoadError:
            return  # whoever loads it says what is wrong with it
        if other != own:
            yield other


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
