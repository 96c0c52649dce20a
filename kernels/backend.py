"""Which implementation of the kernels computes: chosen once, by the engine, and handed down to every call.

`reference` is plain torch and runs everywhere; `cpu` is C++ compiled for this machine; `triton` is for NVIDIA GPUs.
"""

from typing import Literal

import torch

from .cpu_library import DTYPES, cpu_library

Backend = Literal["reference", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")


def resolve_backend(
    device: torch.device, dtype: torch.dtype, requested: Literal["auto", "reference", "cpu", "triton"] = "auto"
) -> Backend:
    """The backend for models of `dtype` on `device`.

    auto: on a CPU the C++ kernels, or the reference, with one warning, where they cannot be compiled (the type float16
    is the reference's too); on a GPU the reference. Raises `ValueError` for a backend that cannot compute there.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "reference":
        return "reference"
    if device.type == "cuda":
        if requested == "cpu":
            raise ValueError("the backend cpu does not compute on a GPU")
        return "triton" if requested == "triton" else "reference"
    if requested == "triton":
        raise ValueError(f"the backend triton needs a GPU, the device is {device.type}")
    usable = device.type == "cpu" and dtype in DTYPES and cpu_library() is not None
    if requested == "cpu" and not usable:
        raise ValueError(f"the backend cpu cannot compute {dtype} on this machine")
    return "cpu" if usable else "reference"
