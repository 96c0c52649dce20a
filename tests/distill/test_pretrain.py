"""A run that stops and goes on ends with the same weights as one that does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from quire.distill.corpus import Corpus
from quire.distill.network import Shape
from quire.distill.pretrain import Settings, Trainer, length_at, rate_at
from quire.distill.samples import Mixture

SHAPE = Shape(layers=2, hidden=192, mlp=64, context=256)


def settings(out: Path) -> Settings:
    """Twenty steps of 128 tokens, evaluated only at the end."""
    out.mkdir(parents=True, exist_ok=True)
    return Settings(
        out=out, tokens=20 * 128, micro_tokens=128, batch_tokens=128, eval_tokens=10**9, eval_trials=1,
        compiled=False, mixture=Mixture(recall=0.4, copy=0.2, random_copy=0.1, chat=0.1),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation changes no weights and takes seconds."""
    monkeypatch.setattr(Trainer, "evaluate", lambda self: None)


def test_resumed_run_is_bit_identical(tmp_path: Path, tokenizer: Tokenizer, corpus: Corpus) -> None:
    whole = Trainer(settings(tmp_path / "whole"), SHAPE, tokenizer, corpus)
    whole.run()
    first = Trainer(settings(tmp_path / "parts"), SHAPE, tokenizer, corpus)
    first.run(max_steps=9)
    second = Trainer(settings(tmp_path / "parts"), SHAPE, tokenizer, corpus)
    assert second.resume() and second.progress.step == 9
    second.run()
    assert second.progress.step == whole.progress.step == 20
    for (name, one), (_, other) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    for name, buffer in whole.optimizer.momentum.items():
        assert torch.equal(buffer, second.optimizer.momentum[name]), name


def test_fresh_folder_has_nothing_to_resume(tmp_path: Path, tokenizer: Tokenizer, corpus: Corpus) -> None:
    assert not Trainer(settings(tmp_path), SHAPE, tokenizer, corpus).resume()


def test_rate_warms_up_stays_and_falls(tmp_path: Path) -> None:
    run = replace(settings(tmp_path), warmup=0.1, decay=0.5, last_rate=0.02)
    rates = [rate_at(run, done) for done in (0.0, 0.05, 0.2, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.05, 0.5, 1.0, 1.0, 0.5, 0.02])


def test_row_lengths_fit_the_micro_batch(tmp_path: Path) -> None:
    run = replace(settings(tmp_path), micro_tokens=4096)
    lengths = {length_at(run, step, 4096) for step in range(200)}
    assert lengths == {512, 1024, 2048, 4096}
    assert length_at(replace(run, micro_tokens=128), 0, 4096) == 128
