"""Results on disk: what is written is found again by the same sweep, and by no other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from quire.evaluation.cells import Cell
from quire.evaluation.report import read_cells, write_json

ABOUT: dict[str, Any] = {"quire": "1", "format": "code", "sweep": {"seed": 0}, "engine": {"model": {"name": "m"}}}
CELL = Cell("needle", 512, "window", 0.5, 0.5, 0.1, 0.9, -0.5, -1.0, 0.0, [0.0, 1.0], True, 0.5, 1e6, 100.0, 1.0, 0.1)


def test_cells_come_back_for_the_same_sweep_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert read_cells(path, ABOUT) == []
    cells = [CELL, replace(CELL, keep=0.25)]
    write_json(path, cells, ABOUT)
    assert read_cells(path, ABOUT) == cells and list(tmp_path.iterdir()) == [path]
    for other in (
        {"quire": "2"},
        {"format": "prose"},
        {"sweep": {"seed": 1}},
        {"engine": {"model": {"name": "n"}}},
    ):
        assert read_cells(path, ABOUT | other) == []
    assert read_cells(path, ABOUT | {"engine": {"model": {"name": "m"}, "pages": 7}}) == cells
    for text in ("", "[]", '{"cells": 3}', path.read_text()[:-20]):
        path.write_text(text)
        assert read_cells(path, ABOUT) == []
