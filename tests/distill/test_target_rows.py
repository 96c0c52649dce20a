"""What is stored of the target's distributions comes back, and nothing half-written is taken for whole."""

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.core.top_rows import pack_rows
from quire.distill.divergences import ABSENT, DIVERGENCES, FORMULAS, lump
from quire.distill.target_rows import Logged, Recorder, Row, Shard, read_rows

CPU = torch.device("cpu")
VOCAB = 50
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
ROWS = [[3, 4, 5], [7, 8, 9, 10, 11], [49]]
PLAIN = [Row(row) for row in ROWS]


def logits(ids: Tensor) -> Tensor:
    """A bigram model."""
    return TABLE[ids]


def recorder(kept: int = 6, temperature: float = 1.0) -> Recorder:
    return Recorder(logits, VOCAB, kept, temperature, CPU)


def test_rows_come_back_padded_with_their_distributions(tmp_path: Path) -> None:
    recorder(temperature=2.0).write(tmp_path / "one", PLAIN)
    recorder(temperature=2.0).write(tmp_path / "two", [Row([1, 2])])
    shards = [Shard(tmp_path / "one"), Shard(tmp_path / "two")]
    batch = read_rows(shards, [(0, 1), (1, 0), (0, 2)], CPU)
    assert batch.counts.tolist() == [5, 2, 1] and batch.ids.shape == (3, 5)
    assert batch.valid.sum(1).tolist() == [5, 2, 1]
    for index, row in enumerate([ROWS[1], [1, 2], [49]]):
        assert batch.ids[index, : len(row)].tolist() == row
        best = (TABLE[row] / 2.0).topk(6).indices
        assert torch.equal(batch.top_ids[index, : len(row)], best)
        # float16 log-probabilities: about one in two thousand
        exact = lump(TABLE[row] / 2.0, best)
        assert torch.allclose(batch.top_log[index, : len(row)], exact, rtol=2e-3, atol=2e-3)
    assert torch.allclose(batch.top_log.exp().sum(-1), torch.ones(3, 5), atol=1e-6)


def test_a_shard_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def give_up(row: int) -> None:
        if row == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder().write(tmp_path / "one", PLAIN, give_up)
    assert not (tmp_path / "one").exists()
    recorder().write(tmp_path / "one", PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and len(Shard(tmp_path / "one")) == 3


def test_rows_for_which_there_is_no_room_are_refused(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError):
            recorder(kept=40).write(tmp_path / "one", PLAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "one").exists()


def test_four_bytes_per_kept_token(tmp_path: Path) -> None:
    recorder(kept=8).write(tmp_path / "one", [Row([1] * 100)] * 10)
    size = sum(path.stat().st_size for path in (tmp_path / "one").iterdir())
    assert size < 1000 * (4 * (8 + 1) + 2) + 2000


LOGGED = 12
"""Tokens of each logged distribution."""


def as_logged(ids: list[int], start: int) -> Row:
    """The row, with what a server logs of what the model says from `start` on."""
    best = TABLE[ids[start:]].log_softmax(-1).topk(LOGGED)
    return Row(ids, start, Logged(b"".join(pack_rows(best.indices.numpy(), best.values.numpy())), LOGGED))


@pytest.mark.parametrize("kept", [5, LOGGED, 20])
def test_what_was_logged_makes_the_rows_that_a_pass_makes(tmp_path: Path, kept: int) -> None:
    ids = [7, 8, 9, 10, 11, 12]
    recorder(min(kept, LOGGED)).write(tmp_path / "passed", [Row(ids, 2), Row([1, 2, 3])])
    recorder(kept).write(tmp_path / "logged", [as_logged(ids, 2), Row([1, 2, 3])])
    passed, logged = (read_rows([Shard(tmp_path / name)], [(0, 0), (0, 1)], CPU) for name in ("passed", "logged"))
    assert torch.equal(logged.ids, passed.ids) and torch.equal(logged.valid, passed.valid)
    assert logged.valid.tolist() == [[False] * 2 + [True] * 4, [True] * 3 + [False] * 3]
    known, q_logits = min(kept, LOGGED), torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    p, exact = logged.top_log[0, 2:], passed.top_log[0, 2:]
    assert torch.equal(logged.top_ids[0, 2:, :known], passed.top_ids[0, 2:])
    assert torch.allclose(p[:, [*range(known), -1]], exact, atol=5e-3) and (p[:, known:-1] == ABSENT).all()
    q = lump(q_logits.requires_grad_(), logged.top_ids[0, 2:], p[:, :-1] == ABSENT)
    same = lump(q_logits, passed.top_ids[0, 2:])
    for name in DIVERGENCES:
        losses, wanted = FORMULAS[name](p, q), FORMULAS[name](exact, same)
        assert torch.allclose(losses, wanted, rtol=0.02, atol=2e-3), name
        (slope,), (exactly,) = (torch.autograd.grad(x.sum(), q_logits, retain_graph=True) for x in (losses, wanted))
        assert torch.allclose(slope, exactly, atol=5e-3), name


def test_other_logs_than_the_targets_stand_out() -> None:
    row = as_logged([7, 8, 9, 10], 1)
    assert recorder().agreement(row) > 0.99
    assert recorder().agreement(Row([8, 9, 10, 7], 1, row.logged)) < 0.8


def test_logs_may_go_on_behind_a_row(tmp_path: Path) -> None:
    whole = as_logged([7, 8, 9, 10, 11, 12], 2)
    recorder().write(tmp_path / "cut", [Row(whole.ids[:4], 2, whole.logged)])
    recorder().write(tmp_path / "whole", [whole])
    cut, rows = (read_rows([Shard(tmp_path / name)], [(0, 0)], CPU) for name in ("cut", "whole"))
    assert torch.equal(cut.top_log[0, 2:4], rows.top_log[0, 2:4])
