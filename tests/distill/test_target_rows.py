"""What is stored of the target's distributions comes back, and nothing half-written is taken for whole."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.distill.divergences import lump
from quire.distill.target_rows import Recorder, Shard, read_rows

CPU = torch.device("cpu")
VOCAB = 50
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
ROWS = [[3, 4, 5], [7, 8, 9, 10, 11], [49]]


def logits(ids: Tensor) -> Tensor:
    """A bigram model."""
    return TABLE[ids]


def recorder(kept: int = 6, temperature: float = 1.0) -> Recorder:
    return Recorder(logits, VOCAB, kept, temperature, CPU)


def test_rows_come_back_padded_with_their_distributions(tmp_path: Path) -> None:
    recorder(temperature=2.0).write(tmp_path / "one", ROWS)
    recorder(temperature=2.0).write(tmp_path / "two", [[1, 2]])
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
        recorder().write(tmp_path / "one", ROWS, give_up)
    assert not (tmp_path / "one").exists()
    recorder().write(tmp_path / "one", ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and len(Shard(tmp_path / "one")) == 3


def test_four_bytes_per_kept_token(tmp_path: Path) -> None:
    recorder(kept=8).write(tmp_path / "one", [[1] * 100] * 10)
    size = sum(path.stat().st_size for path in (tmp_path / "one").iterdir())
    assert size < 1000 * (4 * (8 + 1) + 2) + 2000
