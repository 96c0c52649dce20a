"""xformers as a backend: on a CPU with a stand-in detection, fallback and our side of the call, on a GPU the real."""

import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import attention_xformers, backend
from quire.kernels.attention import paged_attention
from quire.kernels.attention_reference import paged_attention_reference

from .oracle import make_case, naive_append
from .triton_interpreter import ON_GPU, attention_arguments, to_device, tolerance, widened

CPU = torch.device("cpu")


@dataclass
class SequenceInfo:
    """The fields of the library's class that we touch."""

    seqlen: Tensor
    starts: list[int]
    padding: int = 0


@dataclass
class Mask:
    """Rows of block b see its keys up to the diagonal that ends at the lower right of its `seqlen` keys."""

    q_seqinfo: SequenceInfo
    k_seqinfo: SequenceInfo

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_padding: int, kv_seqlen: list[int], *, device: Any) -> "Mask":
        starts = [0, *torch.tensor(q_seqlen).cumsum(0).tolist()]
        keys = SequenceInfo(torch.tensor(kv_seqlen, dtype=torch.int32), [], kv_padding)
        return cls(SequenceInfo(torch.tensor(q_seqlen), starts), keys)


def forward(query: Tensor, key: Tensor, value: Tensor, attn_bias: Mask, scale: float) -> Tensor:
    """[1, rows, G, D] over [1, blocks * padding, G, D], block by block."""
    output = torch.full_like(query, float("nan"))
    padding = attn_bias.k_seqinfo.padding
    for block, held in enumerate(attn_bias.k_seqinfo.seqlen.tolist()):
        first, last = attn_bias.q_seqinfo.starts[block : block + 2]
        keys, values = (x[0, block * padding : block * padding + held].float() for x in (key, value))
        scores = torch.einsum("qgd,kgd->gqk", query[0, first:last].float(), keys) * scale
        seen = torch.ones(scores.shape[1:]).tril(held - (last - first)).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        output[0, first:last] = torch.einsum("gqk,kgd->qgd", weights, values).to(query.dtype)
    return output


def forget() -> None:
    for function in ("xformers_obstacle", "_bias", "_row_order", "_uploaded", "_operations"):
        getattr(attention_xformers, function).cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A stand-in under the library's name, whose operator a test may break."""
    stand_in = types.SimpleNamespace(memory_efficient_attention_forward=forward)
    masks = types.SimpleNamespace(BlockDiagonalCausalWithOffsetPaddedKeysMask=Mask)
    modules = {"xformers": types.SimpleNamespace(), "xformers.ops": stand_in}
    for name, module in (modules | {"xformers.ops.fmha": types.SimpleNamespace()}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", masks)
    forget()
    yield stand_in
    forget()


CASES = (
    ([[9, 4], [12, 3], [0, 30]], [1, 1, 1]),
    ([[9, 4], [0, 0], [30, 1]], [3, 17, 1]),
    ([[5], [40]], [2, 1]),
)


@pytest.mark.parametrize(("kept", "lengths"), CASES)
@pytest.mark.parametrize("groups", [1, 4])
def test_heads_of_different_lengths_are_sequences_of_their_own(
    library: Any, kept: list[list[int]], lengths: list[int], groups: int
) -> None:
    case = make_case(kept, lengths, groups=groups, head_dim=16, gap=2, dtype=torch.float16)
    naive_append(case)
    arguments = attention_arguments(case) | {"max_kept": case.max_kept, "value_dim": 16, "scale": 0.3}
    result = paged_attention(**arguments, backend="xformers")
    wide = attention_arguments(widened(case)) | {"max_kept": case.max_kept, "value_dim": 16, "scale": 0.3}
    torch.testing.assert_close(result.float(), paged_attention_reference(**wide), **tolerance(torch.float16))


def test_what_it_cannot_express_goes_to_triton(library: types.SimpleNamespace) -> None:
    def refuse(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("not a call for xformers")

    library.memory_efficient_attention_forward = refuse
    case = make_case([[9, 4], [12, 3]], [1, 2], dtype=torch.float16)
    naive_append(case)
    wide = widened(case)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float16)
    for options in (
        {"window": 5},
        {"softcap": 3.0},
        {"sinks": sinks},
        {"value_dim": 8},
        {"log_sums": torch.zeros(3, 4)},
    ):
        both: dict[str, Any] = {"max_kept": case.max_kept, "value_dim": 16, "scale": 0.3} | options
        result = paged_attention(**attention_arguments(case), **both, backend="xformers")
        sums = both.pop("log_sums", None)
        expected = paged_attention_reference(**attention_arguments(wide), **both)
        torch.testing.assert_close(result.float(), expected, **tolerance(torch.float16))
        assert sums is None or sums.all()


def obstacle(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """`xformers_obstacle` with the probe's tensors on the CPU."""
    probe = attention_xformers._probe
    monkeypatch.setattr(attention_xformers, "_probe", lambda device, dtype: probe(CPU, dtype))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: zeros(*shape, **options | {"device": CPU}))
    return attention_xformers.xformers_obstacle(torch.device(device), dtype)


def test_it_is_asked_to_compute_before_it_is_taken(
    library: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obstacle("cuda", torch.float16, monkeypatch) is None
    assert obstacle("cuda", torch.float32, monkeypatch) == "it computes float16 and bfloat16, not float32"
    library.memory_efficient_attention_forward = None
    assert str(obstacle("cuda", torch.bfloat16, monkeypatch)).startswith("TypeError: ")


def test_a_missing_library_costs_one_line(
    library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    reason = obstacle("cuda", torch.float16, monkeypatch)
    assert reason is not None and "xformers" in reason and "\n" not in reason
    with caplog.at_level(logging.WARNING, "quire"):
        assert backend.resolve_backend(torch.device("cuda"), torch.float16, "xformers") == "triton"
        assert backend.resolve_backend(CPU, torch.float16, "xformers") == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        f"xformers cannot compute attention here ({reason}); the backend is triton instead",
        "xformers cannot compute attention here (it needs a GPU, the device is cpu); the backend is auto's choice "
        "instead",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("kept", "lengths"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_real_library_agrees(kept: list[list[int]], lengths: list[int], dtype: torch.dtype) -> None:
    reason = attention_xformers.xformers_obstacle(torch.device("cuda"), dtype)
    if reason is not None:
        pytest.skip(reason)
    case = make_case(kept, lengths, groups=4, head_dim=64, page_size=16, gap=2, dtype=dtype)
    naive_append(case)
    there = to_device(case, "cuda")
    options: dict[str, Any] = {"max_kept": case.max_kept, "value_dim": 64, "scale": 0.3}
    results = [paged_attention(**attention_arguments(there), **options, backend=b) for b in ("xformers", "triton")]
    torch.testing.assert_close(*results, **tolerance(dtype))
