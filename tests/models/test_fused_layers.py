"""The forward pass in one call of the C++ kernels against its layers one by one: equal to the bit."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels.cpu_library import cpu_library
from quire.kernels.rotary import Angles
from quire.models.context import AttentionContext
from quire.models.native_layers import Decoder, LayerShape, TokenWeights
from quire.models.placement import Placement

pytestmark = pytest.mark.skipif(cpu_library() is None, reason="the C++ kernels cannot be compiled here")

PAGE, COLUMNS, VOCAB, HEADS, KV_HEADS, WIDTH = 4, 9, 50, 6, 2, 32
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {"qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": False},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": False},
    "qk_norm": {"qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": True},
}


class Onlooker:
    """An observer that does nothing but be there, so that layers are computed one by one."""

    needs_log_sums = False

    def observe(self, *_: Any) -> None:
        """Nothing."""


def random_decoder(dtype: torch.dtype, switches: dict[str, Any]) -> Decoder:
    shape = LayerShape(96, 160, HEADS, KV_HEADS, WIDTH, 1e-5, **switches)
    place = Placement(torch.device("cpu"), dtype, "cpu")
    decoder = Decoder(shape, F.silu, (None, 7, None), TokenWeights.fresh(VOCAB, 96, False, place), place)
    generator = torch.Generator().manual_seed(0)
    for weight in decoder.parameters():
        weight.normal_(0.0, 0.2, generator=generator)
    return decoder


def batch(dtype: torch.dtype, lengths: tuple[int, ...], kept: int, rows: Tensor | None) -> AttentionContext:
    """Sequences that hold `kept` random entries each and bring `lengths` new ones; `rows`: their slots, if not all."""
    slots = len(lengths) if rows is None else int(rows.max()) + 1
    shape = (slots, 3, KV_HEADS, COLUMNS)
    pages, generator = torch.Size(shape).numel(), torch.Generator().manual_seed(1)
    start = torch.tensor([0, *lengths]).cumsum(0)
    return AttentionContext(
        pool=torch.randn(pages, 2, PAGE, WIDTH, generator=generator).to(dtype),
        entry_positions=torch.arange(PAGE, dtype=torch.int32).repeat(pages, 1),
        page_table=torch.randperm(pages, generator=generator).int().view(shape),
        kept=torch.full(shape[:3], kept, dtype=torch.int32),
        query_start=start.int(),
        query_lengths=lengths,
        positions=torch.cat([torch.arange(kept, kept + length) for length in lengths]),
        destinations=None,
        max_kept=kept + max(lengths),
        table_rows=rows,
        backend="cpu",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (1, 20, 3)])
@torch.inference_mode()
def test_one_call_is_the_layers_one_by_one(dtype: torch.dtype, switches: str, lengths: tuple[int, ...]) -> None:
    decoder, total = random_decoder(dtype, SWITCHES[switches]), sum(lengths)
    ids = torch.arange(total) * 7 % VOCAB
    table = torch.randn(total + 5, WIDTH // 2, generator=torch.Generator().manual_seed(2))
    cos, sin, picked = table.cos().to(dtype), table.sin().to(dtype), torch.arange(total).flip(0) + 3
    gathered, angles = Angles(cos[picked], sin[picked]), Angles(cos, sin, picked)
    wanted = torch.tensor([total - 1, *range(total), 0])
    slots = torch.arange(len(lengths)).flip(0) + 1
    for rows in (None, slots):
        apart, together = (batch(dtype, lengths, 11, rows) for _ in range(2))
        apart.observer = Onlooker()
        expected = decoder(ids, gathered, apart, wanted)
        before = together.pool.clone()
        assert torch.equal(decoder(ids, angles, together, wanted), expected)
        assert expected.isfinite().all()
        assert torch.equal(together.pool, apart.pool)
        assert not torch.equal(together.pool, before)
        assert torch.equal(together.entry_positions, apart.entry_positions)
        assert together.layers_seen == apart.layers_seen == [0, 1, 2]
        assert together.scorings == apart.scorings


@torch.inference_mode()
def test_a_cache_of_another_shape_is_refused() -> None:
    decoder = random_decoder(torch.float32, SWITCHES["plain"])
    context = batch(torch.float32, (1,), 3, None)
    context.pool = context.pool[..., : WIDTH // 2].contiguous()
    angles = torch.zeros(1, WIDTH // 2)
    with pytest.raises(ValueError, match=f"the cache must have {KV_HEADS} heads of {WIDTH}"):
        decoder(torch.tensor([0]), Angles(angles, angles), context, torch.tensor([0]))


@pytest.mark.parametrize("wrong", [-1, VOCAB])
@torch.inference_mode()
def test_an_id_that_is_no_token_is_refused(wrong: int) -> None:
    decoder, context = random_decoder(torch.float32, SWITCHES["plain"]), batch(torch.float32, (2,), 3, None)
    angles, before = Angles(torch.ones(2, WIDTH // 2), torch.zeros(2, WIDTH // 2)), context.pool.clone()
    with pytest.raises(IndexError, match=f"not below {VOCAB}"):
        decoder(torch.tensor([0, wrong]), angles, context, torch.tensor([1]))
    assert torch.equal(context.pool, before)
