"""Which implementation of the kernels computes: chosen once, by the engine, and handed down to every call.

`reference` is plain torch and runs everywhere; `cpu` is C++ compiled for this machine; `triton` is for NVIDIA GPUs, and
`xformers` is `triton` but for attention calls that xformers can express. Whether Triton's kernels compute rightly on a
device, for a given model, `kernels.self_check` finds out.
"""

import importlib.util
import logging
from typing import Literal

import torch

from .cpu_library import DTYPES, cpu_library

log = logging.getLogger("quire")

Backend = Literal["reference", "cpu", "triton", "xformers"]
BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton", "xformers")
TRITON_BACKENDS: tuple[Backend, ...] = ("triton", "xformers")
"""Those whose operations beside attention are the Triton kernels."""


def resolve_backend(
    device: torch.device,
    dtype: torch.dtype,
    requested: Literal["auto", "reference", "cpu", "triton", "xformers"] = "auto",
) -> Backend:
    """The backend for models of `dtype` on `device`.

    auto: on a CPU the C++ kernels, or the reference, with one warning, where they cannot be compiled (the type float16
    is the reference's too); on a GPU triton, or the reference, with one warning, where the package is missing. xformers
    is optional: where it cannot compute, one warning says so and triton (on a CPU: what auto takes) does. Raises
    `ValueError` for another backend that cannot compute there.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "xformers":
        from .attention_xformers import xformers_obstacle  # an optional backend costs nothing until it is asked for

        obstacle = xformers_obstacle(device, dtype)
        if obstacle is None and _require_triton():
            return "xformers"
        requested, instead = ("triton", "triton") if device.type == "cuda" else ("auto", "auto's choice")
        log.warning("xformers cannot compute attention here (%s); the backend is %s instead", obstacle, instead)
    if requested == "reference":
        return "reference"
    if device.type == "cuda":
        if requested == "cpu":
            raise ValueError("the backend cpu does not compute on a GPU")
        if requested == "auto" and not _has_triton():
            log.warning("the package triton is missing (quire[gpu] brings it): plain torch computes, more slowly")
            return "reference"
        return "triton" if _require_triton() else "reference"
    if requested == "triton":
        raise ValueError(f"the backend triton needs a GPU, the device is {device.type}")
    usable = device.type == "cpu" and dtype in DTYPES and cpu_library() is not None
    if requested == "cpu" and not usable:
        raise ValueError(f"the backend cpu cannot compute {dtype} on this machine")
    return "cpu" if usable else "reference"


def _has_triton() -> bool:
    """Whether the package is installed: it comes with torch for CUDA, but not with every build."""
    return importlib.util.find_spec("triton") is not None


def _require_triton() -> bool:
    """True, or `ValueError` where the package is missing."""
    if not _has_triton():
        raise ValueError("the backend triton needs the package triton: install quire[gpu]")
    return True
