"""A run that stops and goes on ends with the same weights as one that does not."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from quire.distill.draft_init import Init, make_draft
from quire.distill.draft_trainer import DraftTrainer, Schedule
from quire.distill.prompts import Example
from quire.distill.rounds import Mixture, RowMaker
from quire.distill.target_rows import Recorder, Row

from .drafting import VOCAB, Parrot, tiny_target

SCHEDULE = Schedule(steps=14, batch_rows=4, micro_rows=3, round_rows=12, passes=2, window=2, warmup=2)
CPU = torch.device("cpu")


class Run:
    """Trainer and data of a run in `folder`."""

    def __init__(self, folder: Path, target: PreTrainedModel) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        examples = [Example(tuple(range(n + 3, n + 9)), tuple(range(n + 9, n + 13))) for n in range(20)]
        self.rows = RowMaker(examples, Mixture(), 16, (1.0,), 0, str(folder))
        self.folder = folder
        self.target = target
        draft = make_draft(Init("layers:1", None, True), target, [torch.arange(3, 20)[None]])
        self.trainer = DraftTrainer(draft, SCHEDULE, folder, divergence="kl", temperature=1.0, seed=0)
        self.made: list[int] = []

    def make_shard(self, number: int, path: Path) -> None:
        self.made.append(number)
        rows = self.rows.rows(number, SCHEDULE.rows_of(number), str(self.folder), Parrot())
        Recorder(lambda ids: self.target(input_ids=ids).logits, VOCAB, 8, 1.0, CPU).write(path, rows)

    def train(self, until: int = SCHEDULE.steps) -> "Run":
        trainer = self.trainer
        while trainer.progress.step < until:
            for _ in trainer.train_round(self.make_shard, lambda: trainer.progress.step >= until):
                pass
            trainer.save()
            trainer.drop_old_shards()
        return self


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_target()


def test_resumed_run_is_bit_identical(tmp_path: Path, target: PreTrainedModel) -> None:
    whole = Run(tmp_path / "whole", target).train()
    Run(tmp_path / "parts", target).train(9)
    second = Run(tmp_path / "parts", target)
    assert second.trainer.resume() and second.trainer.progress.step == 9
    second.train()
    assert whole.made == [0, 1, 2] and second.made == [2], "a round that is there is not made again"
    assert whole.trainer.progress.tokens == second.trainer.progress.tokens > 0
    pairs = zip(whole.trainer.draft.named_parameters(), second.trainer.draft.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert torch.equal(one, other), name
    kept = sorted(path.name for path in (tmp_path / "whole").glob("round-*"))
    assert kept == ["round-00001", "round-00002"], "rounds that no step draws from any more are gone"


def test_the_draft_learns_and_what_it_shares_stays(tmp_path: Path, target: PreTrainedModel) -> None:
    run = Run(tmp_path / "run", target)
    losses: list[float] = []
    while not run.trainer.done:
        losses += run.trainer.train_round(run.make_shard, lambda: False)
    assert len(losses) == SCHEDULE.steps and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert torch.equal(run.trainer.draft.model.embed_tokens.weight, target.model.embed_tokens.weight)


def test_a_fresh_folder_has_nothing_to_resume(tmp_path: Path, target: PreTrainedModel) -> None:
    assert not Run(tmp_path / "run", target).trainer.resume()


def test_padding_changes_no_loss(tmp_path: Path, target: PreTrainedModel) -> None:
    run = Run(tmp_path / "run", target)
    from quire.distill.target_rows import Shard, read_rows

    rows = [[5, 6, 7, 8], list(range(20, 34))]
    Recorder(lambda ids: target(input_ids=ids).logits, VOCAB, 8, 1.0, CPU).write(
        tmp_path / "rows", [Row(row) for row in rows]
    )
    shard = Shard(tmp_path / "rows")
    with torch.no_grad():
        apart = [run.trainer.losses(read_rows([shard], [(0, r)], CPU)) for r in (0, 1)]
        together = run.trainer.losses(read_rows([shard], [(0, 0), (0, 1)], CPU))
    assert len(together) == 18
    assert torch.allclose(together, torch.cat(apart), rtol=0.05, atol=1e-3)  # bfloat16 sums in another order


def test_rate_warms_up_stays_and_falls() -> None:
    schedule = Schedule(steps=100, rate=1.0, warmup=10, decay=0.5, last_rate=0.1)
    assert [schedule.rate_at(step) for step in (0, 4, 9, 50, 75, 99)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0.1])


def test_a_last_round_that_is_cut_short_makes_fewer_rows() -> None:
    schedule = Schedule(steps=130, batch_rows=8, round_rows=256, passes=2.0)
    assert schedule.round_steps == 64
    assert [schedule.rows_of(number) for number in range(3)] == [256, 256, 8]
    assert Schedule(steps=74, batch_rows=8, round_rows=256, passes=2.0).rows_of(1) == 40
