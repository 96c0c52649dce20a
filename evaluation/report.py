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


def describe(sweep: Sweep, info: EngineInfo, text_format: str) -> dict[str, Any]:
    """What was asked for, and of which model and machine, as JSON gives it back."""
    about = {
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
            "unseen": sweep.unseen,
            "settings": [msgspec.to_builtins(setting) for setting in sweep.settings],
        },
    }
    described: dict[str, Any] = json.loads(json.dumps(about))
    return described


def write_json(path: Path, found: Sequence[Cell], about: dict[str, Any]) -> None:
    """All cells behind what they are about; whoever reads meanwhile sees the old file or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps(about | {"cells": [asdict(cell) for cell in found]}, indent=1) + "\n", encoding="utf-8"
    )
    partial.replace(path)


def read_cells(path: Path, about: dict[str, Any]) -> list[Cell]:
    """What an earlier run of the same sweep, over the same model, left; nothing if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = all(content[key] == about[key] for key in ("quire", "format", "sweep"))
        if not same or content["engine"]["model"] != about["engine"]["model"]:
            return []
        return [Cell(**cell) for cell in content["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
