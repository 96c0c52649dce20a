"""A whole run with a stand-in for the engine: stopped by a signal, it goes on to the same draft."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quire.core.errors import ConfigError
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


def distillation_in(
    out: Path, target: Path, say: Callable[[str], None] = lambda line: None, length: int = 16
) -> Distillation:
    settings = Settings(
        target=str(target), out=out, init=Init("layers:1"), schedule=SCHEDULE, length=length, held_texts=4, device="cpu"
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


def stopped_in(out: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped within its first round."""
    monkeypatch.setattr(distillation, "LOG_SECONDS", -1.0)

    def say(line: str) -> None:
        if line.startswith("step 2/6"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distillation_in(out, target, say).run()


@pytest.mark.parametrize("name", ["state.pt", "initial.json", "held_out.json", "settings.json", "round-00000/ids.npy"])
@pytest.mark.parametrize("content", [b"", b"{'x"])
def test_a_damaged_file_is_named(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    stopped_in(tmp_path / "run", target, monkeypatch)
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name.split("/")[0]) as caught:
        distillation_in(tmp_path / "run", target).run()
    assert "damaged" in caught.value.message and "\n" not in caught.value.message


def test_a_folder_is_one_runs_at_a_time_and_may_move(tmp_path: Path, target: Path) -> None:
    first = distillation_in(tmp_path / "run", target)
    with pytest.raises(ConfigError, match="another run is at work"):
        distillation_in(tmp_path / "run", target)
    first.run()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved" / ".export-killed").mkdir()
    again = distillation_in(tmp_path / "moved", target)
    assert again.trainer.resume() and again.trainer.done and not (tmp_path / "moved" / ".export-killed").exists()


def test_another_runs_folder_says_what_differs(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_in(tmp_path / "run", target, monkeypatch)
    with pytest.raises(ConfigError, match=r"other settings \(length\)"):
        distillation_in(tmp_path / "run", target, length=32)


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path: Path, target: Path) -> None:
    run, before = distillation_in(tmp_path / "run", target), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # less than the state takes
    try:
        with pytest.raises(ConfigError, match=r"cannot go on: .*the same command continues") as caught:
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in caught.value.message and not [*(tmp_path / "run").glob("state*")]
    distillation_in(tmp_path / "run", target).run()
    assert (tmp_path / "run" / "report.md").exists()
