"""Attention mass: the Triton kernel against its reference, and both against what mass must add up to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels.attention_mass_reference import attention_log_sums, attention_mass

from .oracle import PagedCase, make_case, naive_append, naive_attention
from .triton_interpreter import (
    DEVICES,
    DTYPES,
    attention_arguments,
    attention_mass_triton,
    log_sum_arguments,
    to_device,
    tolerance,
)

pytestmark = pytest.mark.parametrize("device", DEVICES)
SCALE = 0.3


def reference_sums(case: PagedCase, **options: Any) -> Tensor:
    """Log-sum-exps of the case's rows."""
    return attention_log_sums(**log_sum_arguments(case), scale=SCALE, **options)


def check(case: PagedCase, device: str, observe: int | None = None, **options: Any) -> None:
    """Result equals the reference's."""
    naive_append(case)
    sinks = options.pop("sinks", None)
    sums, there = reference_sums(case, sinks=sinks, **options), to_device(case, device)
    shared: dict[str, Any] = {"max_kept": case.max_kept, "scale": SCALE, "observe": observe} | options
    expected = attention_mass(**attention_arguments(case), log_sums=sums, **shared)
    result = attention_mass_triton.attention_mass_triton(
        **attention_arguments(there), log_sums=sums.to(device), **shared
    )
    torch.testing.assert_close(result.cpu(), expected, **tolerance(case.query.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("groups", [1, 4, 7])
def test_shapes_and_types(device: str, head_dim: int, groups: int, dtype: torch.dtype) -> None:
    check(make_case([[70, 0], [9, 33]], [1, 6], head_dim=head_dim, groups=groups, page_size=8, dtype=dtype), device)


@pytest.mark.parametrize("observe", [None, 1, 5, 100])
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 3.0, "sinks": torch.linspace(-2, 2, 4)}])
def test_observed_rows_windows_and_caps(device: str, observe: int | None, options: dict[str, Any]) -> None:
    check(make_case([[20, 90], [0, 3]], [1, 40], gap=2, dtype=torch.float16), device, observe, **options)


def test_mass_weighs_the_values_to_the_attention_output(device: str) -> None:
    """With one row and one query head per kv head, mass times values is the output; sinks take the rest of 1."""
    case = make_case([[30, 5]], [1], groups=1)
    naive_append(case)
    sinks = torch.tensor([0.5, -0.5])
    there = to_device(case, device)
    sums = reference_sums(case, sinks=sinks)
    mass = attention_mass_triton.attention_mass_triton(
        **attention_arguments(there), log_sums=sums.to(device), max_kept=31, scale=SCALE
    ).cpu()
    assert mass[0, 1, 6:].eq(0).all() and (mass.sum(-1) < 1).all()
    index = torch.arange(31)
    values = case.pool[case.page_table[0].long()[:, index // 4], 1, index % 4]
    values[1, 6:] = 0
    output = torch.einsum("ke,ked->kd", mass[0], values)
    expected = naive_attention(case, scale=SCALE, sinks=sinks)[0]
    torch.testing.assert_close(output.double(), expected, **tolerance(torch.float32))


def test_refuses_sums_of_another_shape(device: str) -> None:
    case = to_device(make_case([[3, 5]], [2]), device)
    with pytest.raises(ValueError, match="log_sums must have shape"):
        attention_mass_triton.attention_mass_triton(
            **attention_arguments(case), log_sums=torch.zeros(2, 3, device=device), max_kept=7, scale=1.0
        )
