"""`quire eval-pruning` on the embedded model: files, figures that must hold, refusals."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quire.core.errors import ConfigError, InvalidRequestError, QuireError
from quire.server import cli, evaluate

TINY = ["eval-pruning", "--samples", "2", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command; drawing is left out where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        monkeypatch.setattr(evaluate, "require_matplotlib", lambda: None)
        monkeypatch.setattr(evaluate, "draw", lambda folder, found: [])

    def command(*options: str) -> str:
        result = CliRunner().invoke(cli.app, [*TINY, "--out", str(tmp_path), *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return command


def test_unpruned_and_pruned_are_measured(run: Any, tmp_path: Path) -> None:
    output = run("--policies", "window", "--keeps", "1,0.25", "--lengths", "600", "--tasks", "needle,loss,agreement")
    assert "window" in output and "needle" in output and str(tmp_path / "results.json") in output
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    by = {(cell["measure"], cell["policy"]): cell for cell in cells}
    assert set(by) == {
        (measure, policy)
        for measure in ("needle", "loss", "agreement", "agreement from start")
        for policy in ("none", "window")
    }
    none, pruned = by["needle", "none"], by["needle", "window"]
    assert none["score"] == 1.0 and none["kept_share"] == 1.0 and none["freed_bytes"] == 0.0 and none["speed"] == 1.0
    assert pruned["score"] < 1.0, "needles at the front are not in the window"
    assert 0.2 < pruned["kept_share"] < 0.5 and pruned["freed_bytes"] > 0
    assert by["loss", "window"]["change"] > 0 and by["loss", "window"]["change"] == pytest.approx(
        by["loss", "window"]["score"] - by["loss", "none"]["score"]
    )
    assert by["agreement", "none"]["score"] == 1.0
    assert all(cell["low"] <= cell["score"] <= cell["high"] and len(cell["scores"]) == 2 for cell in cells)
    if find_spec("matplotlib"):
        assert {path.name for path in tmp_path.glob("*.png")} == {"scores.png", "needle.png"}


def test_a_question_that_comes_later_is_answered_from_what_is_left(run: Any, tmp_path: Path) -> None:
    options = [
        "--policies",
        "kvzip/global,window",
        "--keeps",
        "0.4",
        "--lengths",
        "500",
        "--tasks",
        "needle,copying",
        "--no-chunked",
    ]
    run(*options, "--question", "unseen")
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    by = {(cell["measure"], cell["policy"]): cell for cell in cells}
    for measure in ("needle", "copying"):
        none, best, worst = (by[measure, policy] for policy in ("none", "kvzip/global", "window"))
        assert best["kept_share"] < 0.6 and worst["kept_share"] < 0.6, "pruned before the tail"
        assert best["score"] >= none["score"] - 0.05 > worst["score"]


def test_a_sweep_goes_on_where_it_stopped(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--policies", "window,knorm", "--keeps", "0.25", "--lengths", "400", "--tasks", "needle,loss"]
    run(*options)
    path = tmp_path / "results.json"
    whole = json.loads(path.read_text())
    stopped = whole | {"cells": whole["cells"][:5]}
    stopped["cells"][0]["tokens_per_second"] = stopped["cells"][4]["tokens_per_second"] = -1.0
    path.write_text(json.dumps(stopped))
    run(*options)
    again = json.loads(path.read_text())["cells"]
    rates = [cell["tokens_per_second"] for cell in again]
    assert rates[0] == rates[4] == -1.0 and min(rates[3], rates[5]) > 0, "what was there is kept, the rest measured"
    assert [cell["scores"] for cell in again] == [cell["scores"] for cell in whole["cells"]]
    run(*options, "--seed", "3")
    assert min(cell["tokens_per_second"] for cell in json.loads(path.read_text())["cells"]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "nope"], "unknown pruning policy 'nope'; known: window"),
        (["--keeps", "half"], "--keeps must be a list"),
        (["--keeps", "2"], "prune.keep must be"),
        (["--tasks", "juggling"], "unknown task"),
        (["--refine", "polish"], "unknown refinement 'polish'; known: value-norm, chunk"),
        (["--budget", "lavish"], "unknown budget 'lavish'; known: uniform"),
        (["--lengths", "99999"], "at most 4,096"),
        (["--policies", "window/lavish"], "unknown budget 'lavish'; known: uniform"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(run: Any, options: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as raised:
        run("--policies", "window", "--keeps", "0.5", "--tasks", "needle", *options)
    assert "\n" not in raised.value.message


def test_missing_matplotlib_and_an_unwritable_folder_are_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "LLM", None)  # must not be reached
    monkeypatch.setattr(evaluate, "require_matplotlib", lambda: None)
    with pytest.raises(QuireError, match="cannot write"):
        CliRunner().invoke(cli.app, [*TINY, "--out", str(tmp_path / "file" / "x")], catch_exceptions=False)
    monkeypatch.undo()
    monkeypatch.setattr("quire.evaluation.plots.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quire\[plot\]"):
        CliRunner().invoke(cli.app, [*TINY, "--out", str(tmp_path)], catch_exceptions=False)


def test_default_lengths_fit_the_context() -> None:
    assert evaluate.default_lengths(4096) == [512, 1024, 2048, 3500]
    assert evaluate.default_lengths(512) == [400]
    assert all(length < 131_072 for length in evaluate.default_lengths(131_072))
