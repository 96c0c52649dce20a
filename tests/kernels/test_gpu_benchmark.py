"""The GPU benchmark's own path: it refuses without a GPU, and its check runs every section on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "run.py"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script, on a machine that shows no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = run(folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1 and "needs a CUDA device" in result.stdout


def test_interpreted_check_runs_every_section(tmp_path: Path) -> None:
    result = run("--interpret-check", folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu-benchmark.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {
        "check",
        "attention",
        "attention mass",
        "operation",
        "sampling",
        "serving",
        "speculation",
    }
    ours = [row for row in rows if row["contender"] == "quire" or row["section"] in ("serving", "speculation")]
    assert len(ours) >= 12 and all(row["microseconds"] for row in ours), result.stdout
