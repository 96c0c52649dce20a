"""The options of `quire eval-pruning` that say what is measured."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from ..core import pruning

_BUDGETS, _REFINEMENTS = ", ".join(get_args(pruning.Budget)), ", ".join(get_args(pruning.Refinement))


def _sweep(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Sweep")


def _pruning(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Pruning")


Policies = Annotated[
    str, _sweep("Policies, comma-separated, each with /BUDGET if it has its own; all that suit the model if absent.")
]
Keeps = Annotated[str, _sweep("Shares of the entries that stay, comma-separated.")]
Tasks = Annotated[str, _sweep("Tasks, comma-separated; all if absent.")]
Lengths = Annotated[str, _sweep("Prompt tokens, comma-separated; what fits the model if absent.")]
Samples = Annotated[int, _sweep("Trials per task, length and setting.")]
Chunk = Annotated[int, _sweep("Tokens computed, and pruned after, at a time.")]
Question = Annotated[
    Literal["seen", "unseen"],
    _sweep("Whether a generated answer's question is there when the prompt is pruned, or comes after."),
]
TextFormat = Annotated[
    Literal["code", "prose"] | None, _sweep("Text of the trials; code for quire-mini, else prose.", "--format")
]
TrialSeed = Annotated[int, _sweep("Other trials for another seed.")]

Budget = Annotated[str, _pruning(f"Division of the entries among layers and heads: {_BUDGETS}.")]
Threshold = Annotated[float | None, _pruning("With the budget threshold: drops what scores less.")]
Refine = Annotated[str, _pruning(f"Refinements of the scores, comma-separated: {_REFINEMENTS}.")]
Chunked = Annotated[bool, _pruning("Prune after each chunk of the prompt, or at its end alone.")]
Floor = Annotated[int, _pruning("Fewest entries per head that stay.")]
Window = Annotated[int, _pruning("Newest entries that always stay.")]

Out = Annotated[Path, typer.Option(help="Folder for results.json and the plots.")]
