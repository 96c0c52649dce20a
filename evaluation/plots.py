"""The sweep as pictures; needs matplotlib, which is an extra."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..core.errors import ConfigError
from .cells import Cell
from .tasks import DEPTHS


def require_matplotlib() -> None:
    """Raise `ConfigError` now, not after an hour of measuring."""
    if find_spec("matplotlib") is None:
        raise ConfigError("the plots need matplotlib: pip install 'quire[plot]'")


def draw(folder: Path, found: Sequence[Cell]) -> list[Path]:
    """Write the pictures; returns their paths."""
    paths = [_draw_scores(folder / "scores.png", found)]
    needles = [cell for cell in found if cell.measure == "needle"]
    if needles:
        paths.append(_draw_needle(folder / "needle.png", needles))
    return paths


def _draw_scores(path: Path, found: Sequence[Cell]) -> Path:
    """Score over the share of entries really kept: a row per measure, a column per length, a line per policy."""
    from matplotlib.figure import Figure

    measures = list(dict.fromkeys(cell.measure for cell in found))
    lengths = list(dict.fromkeys(cell.length for cell in found))
    policies = [name for name in dict.fromkeys(cell.policy for cell in found) if name != "none"]
    figure = Figure(figsize=(3.2 * len(lengths) + 1.5, 2.2 * len(measures) + 0.6), layout="constrained")
    grid = figure.subplots(len(measures), len(lengths), squeeze=False, sharey="row")
    for row, measure in enumerate(measures):
        for column, length in enumerate(lengths):
            axes = grid[row][column]
            here = [cell for cell in found if (cell.measure, cell.length) == (measure, length)]
            for number, policy in enumerate(policies or ["none"]):
                line = sorted((c for c in here if c.policy in (policy, "none")), key=lambda cell: cell.kept_share)
                shares, scores = [cell.kept_share for cell in line], [cell.score for cell in line]
                # There are ten colours: further policies have them again, dashed.
                style = "-" if number < 10 else "--"
                axes.plot(shares, scores, style, marker=".", color=f"C{number % 10}", label=policy)
                axes.fill_between(shares, [c.low for c in line], [c.high for c in line], color=f"C{number}", alpha=0.12)
            if here and not here[0].measurable:
                axes.text(0.5, 0.5, "the unpruned model\ncannot do it", transform=axes.transAxes, ha="center")
            axes.set_xlim(0, 1.02)
            axes.grid(alpha=0.3)
            axes.set_title(f"{measure}, {length:,} tokens", fontsize=8)
            axes.tick_params(labelsize=7)
    figure.supxlabel("share of entries kept", fontsize=9)
    columns = min(6, 1 + 2 * len(lengths))
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _draw_needle(path: Path, found: Sequence[Cell]) -> Path:
    """Share of needles found by depth (down) and length (across); a panel per setting."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((cell.policy, cell.keep) for cell in found))
    lengths = list(dict.fromkeys(cell.length for cell in found))
    columns = min(6, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(2.1 * columns + 0.6, 2.0 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(settings) :]:
        axes.axis("off")
    for axes, (policy, keep) in zip(grid.flat, settings, strict=False):
        here = {cell.length: cell.scores for cell in found if (cell.policy, cell.keep) == (policy, keep)}
        image = [[_mean(here[length][depth :: len(DEPTHS)]) for length in lengths] for depth in range(len(DEPTHS))]
        axes.imshow(image, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{policy} {keep:g}", fontsize=8)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=6)
        axes.set_yticks(range(len(DEPTHS)), [f"{depth:g}" for depth in DEPTHS], fontsize=6)
    figure.supxlabel("length in tokens", fontsize=8)
    figure.supylabel("depth", fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else float("nan")
