"""The report at the end of a distillation: what the draft gained, and what that should be worth on this machine."""

import importlib.util
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .held_out import ALL, Measured

PLOT = "acceptance.png"


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a decode step by number of sequences, each of one row."""

    target: Mapping[int, float]
    draft: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Gain:
    """The best draft length at a batch size, and the expected speed-up with it."""

    batch: int
    drafts: int
    tokens: float
    """Expected per sequence and step."""
    speedup: float
    """Over a step without drafts; 1 where none pay."""


def expected_tokens(acceptance: Sequence[float]) -> list[float]:
    """Tokens of a step with 0, 1, ... drafts, draft i being accepted with probability acceptance[i] after the others.

    1 + sum over i of the product of the first i acceptances (Leviathan et al. 2022, eq. 1, by position).
    """
    return [1.0, *(1.0 + np.cumsum(np.cumprod(acceptance))).tolist()]


def best_gains(acceptance: Sequence[float], costs: Costs) -> list[Gain]:
    """For each batch size whose draft step was timed, the draft length that promises most.

    A step with k drafts takes k draft steps and one step of the target over 1 + k rows per sequence; rows that were not
    timed are interpolated.
    """
    rows, seconds = zip(*sorted(costs.target.items()), strict=True)
    tokens, gains = expected_tokens(acceptance), []
    for batch, draft in sorted(costs.draft.items()):
        plain = float(np.interp(batch, rows, seconds))
        gain = [
            count * plain / (drafts * draft + float(np.interp(batch * (1 + drafts), rows, seconds)))
            for drafts, count in enumerate(tokens)
        ]
        best = max(range(len(gain)), key=gain.__getitem__)
        gains.append(Gain(batch, best, tokens[best], gain[best] if best else 1.0))
    return gains


def write_report(folder: Path, about: dict[str, Any], before: Measured, after: Measured, costs: Costs) -> list[Path]:
    """Write report.json, report.md and, with matplotlib, a plot; returns their paths.

    about: settings and progress; before: the same measurements of the draft as it began.
    """
    gains = {"greedy": best_gains(after.by_position[ALL], costs)}
    gains["sampled"] = best_gains([after.acceptance[ALL]] * after.most, costs)
    machine = {"quire": version("quire"), "python": platform.python_version(), "platform": platform.platform()}
    content = {"machine": machine, **about, "before": before, "after": after, "costs": costs, "gains": gains}
    written = [folder / "report.json", folder / "report.md"]
    written[0].write_bytes(msgspec.json.format(msgspec.json.encode(content, enc_hook=str), indent=1) + b"\n")
    text = [
        "# Distillation report",
        f"Target `{about['settings']['target']}`, {about['progress']['step']} steps over "
        f"{about['progress']['tokens'] / 1e6:.2f}M tokens.",
        acceptance_table(before, after),
        gains_table(gains),
    ]
    if importlib.util.find_spec("matplotlib"):
        from .draft_plots import draw

        written.append(draw(folder / PLOT, before, after))
        text.append(f"![acceptance by position]({PLOT})")
    written[1].write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return written


def acceptance_table(before: Measured, after: Measured) -> str:
    """Markdown: both drafts by domain, `before -> after`."""
    lines = [
        "Held-out texts; the draft as it began -> as it is. *Sampled*: probability that a token drawn from the draft "
        f"is accepted. *Greedy*: mean accepted tokens of a proposal of {after.most}; a step gives one token more.",
        "",
        "| domain | sampled | same most likely token | greedy | greedy, by position |",
        "|---|---|---|---|---|",
    ]
    for domain in after.acceptance:
        cells = [
            f"{before.acceptance[domain]:.3f} -> {after.acceptance[domain]:.3f}",
            f"{before.agreement[domain]:.3f} -> {after.agreement[domain]:.3f}",
            f"{before.accepted_length[domain]:.2f} -> {after.accepted_length[domain]:.2f}",
            ", ".join(f"{share:.2f}" for share in after.by_position[domain]),
        ]
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains_table(gains: Mapping[str, Sequence[Gain]]) -> str:
    """Markdown: expected speed-up by batch size."""
    lines = [
        "Expected speed-up on this machine, from step times measured at the end of the run:",
        "",
        "| batch | greedy: drafts | tokens a step | speed-up | sampled: drafts | tokens a step | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for greedy, sampled in zip(gains["greedy"], gains["sampled"], strict=True):
        cells = [f"{g.drafts} | {g.tokens:.2f} | {g.speedup:.2f}x" for g in (greedy, sampled)]
        lines.append(f"| {greedy.batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
