"""An engine in a process of its own is timed, stands still out of turn, and its failures are told."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.cells import Cell, Prompts, play, rows
from benchmarks.peers.resident import PeerFailed, Resident

ADAPTER = """
import os, time

def convert(model, folder):
    os.mkdir(folder)

class Engine:
    def __init__(self, settings):
        print("what engines say")
        self.facts = {"version": "1", "types": settings["model"], "pid": str(os.getpid())}

    def generate(self, prompts, output):
        if output == 99:
            raise MemoryError("too much")
        time.sleep(0.02 * output)
        return [[len(prompt)] * (output - (output == 98)) for prompt in prompts]
"""


@pytest.fixture
def engine(tmp_path: Path):
    adapter = tmp_path / "json.py"  # the name of what the worker imports
    adapter.write_text(ADAPTER)
    settings = {"model": "m", "converted": str(tmp_path / "converted")}
    resident = Resident(Path(sys.executable), adapter, settings, tmp_path / "log", limit=60)
    yield resident
    resident.end()


def comes_to_a_stop(resident: Resident) -> bool:
    """Whether the kernel stops the process, which takes it a moment."""
    for _ in range(1000):
        if Path(f"/proc/{resident.facts['pid']}/stat").read_text().rsplit(") ", 1)[1].startswith("T"):
            return True
        time.sleep(0.01)
    return False


def test_resident_answers_in_its_turn_only(engine: Resident, tmp_path: Path):
    assert engine.facts["types"] == str(tmp_path / "converted")  # it loads what it converted
    assert comes_to_a_stop(engine)
    with engine.awake():
        answer = engine.generate([[1, 2], [3]], 5, limit=30)
    assert comes_to_a_stop(engine)
    assert answer.ids == [[2] * 5, [1] * 5]
    assert 0.1 <= answer.seconds < 5
    assert "what engines say" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("output", "limit", "said"), [(99, 30, "too much"), (98, 30, "were asked for"), (50, 0.1, "0 s")]
)
def test_failures_are_told(engine: Resident, output: int, limit: float, said: str):
    with engine.awake(), pytest.raises(PeerFailed, match=said):
        engine.generate([[1]], output, limit)


def test_a_cell_is_repeated_with_new_prompts(engine: Resident):
    seen: list[list[int]] = []

    class Recorded(Prompts):
        def take(self, cell: Cell) -> list[list[int]]:
            seen.extend(prompts := super().take(cell))
            return prompts

    with engine.awake():
        rate = play(engine, Cell(streams=2, prompt=8, output=5), Recorded(100, seed="x"), limit=30)
    assert len({tuple(prompt) for prompt in seen}) == len(seen) == 10
    assert all(len(prompt) == 8 and min(prompt) >= 16 and max(prompt) < 100 for prompt in seen)
    assert 20 < rate <= 100  # 2 x 5 tokens in 0.1 s or more


def test_ratios_are_of_one_round_and_say_who_is_faster():
    rate, first = Cell(1, 128, 64), Cell(1, 2000, 1)
    rounds = [{"quire": {rate: 10.0 * k, first: 30.0}, "other": {rate: 5.0 * k, first: 60.0}} for k in (1, 2, 3)]
    assert list(rows(rounds, [rate, first], ["quire", "other", "broken"])) == [
        ("1 stream, tokens/s", ["20", "10 (2.00x, 2.00 to 2.00)", "failed"]),
        ("first token of 2,000, ms", ["30", "60 (2.00x, 2.00 to 2.00)", "failed"]),
    ]
