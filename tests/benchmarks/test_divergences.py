"""Divergences are compared from the same start on the same rows."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.divergences import make_trial, parse, table
from quire.core.config import embedded_model


def test_every_divergence_gets_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for name, token in (("train", 40), ("held", 90)):
        prompts = [{"prompt_ids": list(range(token + n, token + n + 9)), "domain": name} for n in range(8)]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in prompts))
    options = ["--data", str(files[0]), "--held-out", str(files[1]), "--steps", "2", "--batch-rows", "2"]
    options += ["--round-rows", "4", "--length", "16", "--texts", "2", "--kept", "8"]
    monkeypatch.setattr(sys, "argv", ["divergences", *options])
    args = parse()
    args.seed, args.model = 0, str(embedded_model())
    trial = make_trial(args, tmp_path)
    start = trial.run(None)
    first = trial.run("kl")
    rows = list(tmp_path.glob("round-*/ids.npy"))
    made = [path.stat().st_mtime_ns for path in rows]
    second = trial.run("logacc")
    assert len(rows) == 1 and [path.stat().st_mtime_ns for path in rows] == made
    assert trial.run(None) == start and len({str(found.acceptance) for found in (start, first, second)}) == 3
    assert trial.run("kl") == first
    lines = table([("none", start), ("kl", first)]).splitlines()
    assert lines[0] == "| divergence | all | held |" and len(lines) == 4 and lines[3].startswith("| kl | 0.")
