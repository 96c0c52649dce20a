"""The sweep as a table for people and as JSON with all that is needed to run it again."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
from rich.table import Table

from ..core.messages import EngineInfo
from .cells import Cell
from .sweep import Sweep


def tables(found: Sequence[Cell]) -> list[Table]:
    """One per length: a row per setting, a column per measure, then memory and time over all tasks."""
    return [_table(length, [cell for cell in found if cell.length == length]) for length in _distinct(found, "length")]


def _table(length: int, found: Sequence[Cell]) -> Table:
    measures = _distinct(found, "measure")
    cannot = [name for name in measures if not all(cell.measurable for cell in found if cell.measure == name)]
    note = f"* the unpruned model cannot do it: {', '.join(cannot)} say nothing about pruning" if cannot else None
    table = Table(title=f"{length:,} tokens, {len(found[0].scores)} samples; scores in % [95 % interval]", caption=note)
    for name in ("policy", "keep", "kept", "freed", "speed", "pruning"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name in measures:
        table.add_column(name + (" *" if name in cannot else ""), justify="right")
    for policy, keep in dict.fromkeys((cell.policy, cell.keep) for cell in found):
        row = [cell for cell in found if (cell.policy, cell.keep) == (policy, keep)]
        table.add_row(policy, f"{keep:g}", *_costs(row), *(_shown(cell) for cell in row))
    return table


def _costs(row: Sequence[Cell]) -> list[str]:
    """Means over the measures of a row: kept share, MB freed, speed over unpruned, share of time spent on pruning."""
    return [
        f"{fmean(cell.kept_share for cell in row):.0%}",
        f"{fmean(cell.freed_bytes for cell in row) / 1e6:.1f} MB",
        f"{fmean(cell.speed for cell in row):.2f}x",
        f"{fmean(cell.prune_share for cell in row):.1%}",
    ]


def _shown(cell: Cell) -> str:
    """Score with its interval in per cent; of a loss, what pruning adds to it, with the interval of that."""
    if not cell.loss:
        return f"{100 * cell.score:.0f} [{100 * cell.low:.0f}-{100 * cell.high:.0f}]"
    if cell.policy == "none":
        return f"{cell.score:.3f}"
    return f"{cell.change:+.3f} [{cell.change_low:+.2f} {cell.change_high:+.2f}]"


def _distinct(found: Sequence[Cell], name: str) -> list[Any]:
    return list(dict.fromkeys(getattr(cell, name) for cell in found))


def write_json(path: Path, found: Sequence[Cell], sweep: Sweep, info: EngineInfo, text_format: str) -> None:
    """All cells, the request and the machine."""
    content = {
        "quire": version("quire"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "format": text_format,
        "engine": msgspec.to_builtins(info),
        "sweep": {
            "tasks": list(sweep.tasks),
            "lengths": list(sweep.lengths),
            "samples": sweep.samples,
            "chunk": sweep.chunk,
            "seed": sweep.seed,
            "settings": [msgspec.to_builtins(setting.params) for setting in sweep.settings],
        },
        "cells": [asdict(cell) for cell in found],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
