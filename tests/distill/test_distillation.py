"""A whole run with a stand-in for the engine: stopped by a signal, it goes on to the same draft."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quire.distill import distillation
from quire.distill.distillation import Distillation
from quire.distill.draft_init import Init
from quire.distill.draft_trainer import Schedule
from quire.distill.run_settings import Settings

from .drafting import Parrot, tiny_target

SCHEDULE = Schedule(steps=6, batch_rows=4, round_rows=8, passes=2)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, shipped: Path) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny_target(layers=2).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, folder / name)
    return folder


def distillation_in(out: Path, target: Path, say: Callable[[str], None] = lambda line: None) -> Distillation:
    settings = Settings(
        target=str(target), out=out, init=Init("layers:1"), schedule=SCHEDULE, length=16, held_texts=4, device="cpu"
    )
    return Distillation(settings, Parrot(), say)


@pytest.mark.parametrize("when", ["step 2/6", "step 4/6", "round 1"])
def test_a_signal_stops_a_run_that_then_goes_on(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(distillation, "LOG_SECONDS", -1.0)
    whole = distillation_in(tmp_path / "whole", target)
    whole.run()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith(when) and not any("stopped" in line for line in lines):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        distillation_in(tmp_path / "parts", target, say).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert "the same command goes on" in lines[-1] and not (tmp_path / "parts" / "draft").exists()
    again = distillation_in(tmp_path / "parts", target, say)
    again.run()
    assert any(line.startswith("going on at step") for line in lines)
    for (name, one), (_, other) in zip(whole.draft.named_parameters(), again.draft.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    reports = [(tmp_path / run / "report.md").read_text() for run in ("whole", "parts")]
    assert reports[0] == reports[1]
