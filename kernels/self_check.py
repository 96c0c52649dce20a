"""Whether Quire's GPU kernels compute rightly on a device: each is run once, on small random inputs of a model's own
shapes, and held against its reference in plain torch on the same device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Backend
from .kernel_trials import TRIALS, KernelShape, Trial

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of numbers of size 1: some steps of the type's rounding. What is wrong is wrong by more."""


@dataclass(frozen=True, slots=True)
class KernelFailure:
    """The first kernel that cannot be used."""

    kernel: str
    reason: str
    fatal: bool = False
    """Whether it took the device with it: nothing computes there any more."""


def failed_kernel(
    shape: KernelShape, device: torch.device, dtype: torch.dtype, backend: Backend
) -> KernelFailure | None:
    """The first kernel that raises, does not compile or disagrees with its reference; None: all of them are well.

    backend: one whose kernels are Triton's. What a model of `shape` in `dtype` has no use for is not tried.
    """
    trial = Trial(shape, device, dtype, backend)
    with torch.inference_mode():
        for name, check in TRIALS.items():
            try:
                reasons = (_difference(*pair, dtype) for pair in check(trial))
                reason = next((found for found in reasons if found is not None), None)
            # Whatever a compiler or a driver raises.
            except Exception as error:
                first = (str(error).strip() or "no reason given").splitlines()[0]
                return KernelFailure(name, f"raises {type(error).__name__}: {first[:300]}", not _alive(device))
            if reason is not None:
                return KernelFailure(name, reason)
    return None


def _difference(result: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with a result, if anything is."""
    if result.shape != expected.shape:
        return f"gives {list(result.shape)} where torch gives {list(expected.shape)}"
    allowed = _TOLERANCES[dtype] if expected.is_floating_point() else 0.0
    result, expected = result.double(), expected.double()
    if torch.allclose(result, expected, rtol=allowed, atol=allowed, equal_nan=True):
        return None
    apart = torch.where(result == expected, 0.0, (result - expected).abs()).nan_to_num(nan=float("inf"))
    return f"differs from torch by up to {float(apart.max()):.3g} in {int((apart > allowed).sum())} numbers"


def _alive(device: torch.device) -> bool:
    """Whether the device still computes: after some errors a process cannot use it any more."""
    try:
        return int(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False
