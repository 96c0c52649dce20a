"""The check of the GPU kernels at start: sound ones pass for many shapes, and any kind of broken one is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire.kernels import self_check
from quire.kernels.kernel_trials import TRIALS, KernelShape
from quire.kernels.self_check import KernelFailure, failed_kernel

from .triton_interpreter import DEVICES, DTYPES

pytestmark = pytest.mark.parametrize("device", DEVICES)
SMALL = KernelShape(num_heads=4, num_kv_heads=2, head_dim=16, page_size=8, vocab_size=300)
OURS = {"rotated": 16, "head_norm": True, "hidden": 48, "feed_forward": 64}
SHAPES = [
    SMALL,
    KernelShape(4, 2, 16, 8, 300, (None, 4096), **OURS),  # type: ignore[arg-type]
    KernelShape(6, 1, 80, 16, 2500, (64,), softcap=30.0, sinks=True),
    KernelShape(3, 3, 24, 4, 3, rotated=8),
]


def failure(shape: KernelShape, device: str, dtype: torch.dtype = torch.float32) -> KernelFailure | None:
    return failed_kernel(shape, torch.device(device), dtype, "triton")


@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[1], torch.float32), (SHAPES[2], torch.float16)])
def test_sound_kernels_pass(device: str, shape: KernelShape, dtype: torch.dtype) -> None:
    assert failure(shape, device, dtype) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sound_kernels_pass_for_all_types(device: str, shape: KernelShape, dtype: torch.dtype) -> None:
    assert failure(shape, device, dtype) is None


def broken(whole: Callable[..., Any], spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function with another result."""
    return lambda *args, **kwargs: spoil(whole(*args, **kwargs))


BROKEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "cache append": ("append_rotated_triton.append_rotated_triton", lambda nothing: None),
    "attention": ("attention_triton.paged_attention_triton", lambda output: output * 1.01),
    "norm": ("layers_triton.add_rms_norm_triton", lambda both: (both[0], both[1].roll(1, 0))),
    "gated activation": ("layers_triton.gated_activation_triton", lambda gated: gated.where(gated != gated.max(), 0)),
    "sampling": ("sampling_triton.draw_triton", lambda tokens: tokens.clamp(min=tokens.max())),
    "draft verification": ("rejection_triton.judge_drafts_triton", lambda tokens: tokens.flip(0)),
    "log-probabilities": ("logprobs_triton.token_logprobs_triton", lambda found: (found[0], found[1] + 1, found[2])),
    "attention mass": ("attention_mass_triton.attention_mass_triton", lambda mass: mass / mass.sum()),
    "attention columns": ("attention_columns_triton.attention_columns_triton", lambda sums: sums.flip(1)),
    "compaction": ("compaction_triton.compact_kv_triton", lambda nothing: None),
    "page bounds": ("page_bounds_triton.page_key_bounds_triton", lambda nothing: None),
}
IN_PLACE = ("cache append", "compaction", "page bounds")


@pytest.mark.parametrize("kernel", BROKEN)
def test_a_broken_kernel_is_named(device: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, spoil = BROKEN[kernel]
    module, name = path.split(".")
    found = __import__(f"quire.kernels.{module}", fromlist=[name])
    # What writes in place is broken by not being run.
    whole = (lambda *args, **kwargs: None) if kernel in IN_PLACE else getattr(found, name)
    monkeypatch.setattr(found, name, broken(whole, spoil))
    monkeypatch.setattr(self_check, "TRIALS", {kernel: TRIALS[kernel]})
    result = failure(SHAPES[1], device)
    assert result is not None and result.kernel == kernel and not result.fatal
    assert "differs from torch by up to" in result.reason


def test_what_raises_is_told(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("ptxas does not know sm_999\nand so on")

    monkeypatch.setattr("quire.kernels.attention_triton.paged_attention_triton", refuse)
    assert failure(SMALL, device) == KernelFailure("attention", "raises OSError: ptxas does not know sm_999")
    monkeypatch.setattr(self_check, "_alive", lambda where: False)
    result = failure(SMALL, device)
    assert result is not None and result.fatal


def test_only_what_the_model_uses_is_tried(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("add_rms_norm_triton", "gated_activation_triton"):
        monkeypatch.delattr(f"quire.kernels.layers_triton.{name}")
    layers = {name: TRIALS[name] for name in ("gated activation", "norm")}
    monkeypatch.setattr(self_check, "TRIALS", layers)
    assert failure(SMALL, device) is None
    result = failure(SHAPES[1], device)
    assert result is not None and result.kernel == "gated activation"
