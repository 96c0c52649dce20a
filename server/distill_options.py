"""The options of `quire distill`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_DRAFT = "Draft"
_DATA = "Data"
_TRAINING = "Training"


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


Target = Annotated[
    str | None,
    typer.Option(envvar="QUIRE_MODEL", help="Checkpoint folder or hub name to draft for; quire-mini if absent."),
]
Out = Annotated[Path, typer.Option(help="Folder of the run; the same command goes on where it stopped.")]

Preset = Annotated[
    Literal["tiny", "small"] | None,
    _option(
        "How the draft begins, by its layers' share of the target's: tiny a tenth, small a fifth. Sets --init and "
        "--mlp.",
        _DRAFT,
    ),
]
Init = Annotated[
    str | None,
    _option(
        "How the draft begins: layers:N keeps the target's N most important layers, layers:I,J,... these, random:N "
        "as many new ones; or a checkpoint folder to go on from. layers:2 if absent.",
        _DRAFT,
    ),
]
Mlp = Annotated[int | None, _option("Feed-forward width of the draft; its most active neurons stay.", _DRAFT)]
KvHeads = Annotated[
    int | None,
    _option("Key/value heads of the draft, each with its query heads; the most active ones stay.", _DRAFT),
]
Hidden = Annotated[
    int | None,
    _option("Hidden size of the draft; the strongest channels stay, and it has an embedding of its own.", _DRAFT),
]
ShareEmbedding = Annotated[
    bool | None,
    _option(
        "Use the target's embedding and head, untrained and not stored with the draft; default: where Quire's own "
        "model code runs the target.",
        _DRAFT,
        "--share-embedding/--no-share-embedding",
    ),
]

Data = Annotated[
    list[Path] | None,
    _option(
        'Prompts, one JSON object a line: {"prompt": ...}, {"messages": [...]} or {"prompt_ids": [...]}, each with an '
        "answer (completion or output_ids) and a domain if there is one. May be given several times.",
        _DATA,
    ),
]
FromTraffic = Annotated[
    Path | None,
    _option(
        "The log that `quire serve --distill-log` wrote; where it has the model's most likely tokens, they are learned "
        "from without a pass of the target.",
        _DATA,
    ),
]
SelfData = Annotated[
    bool,
    _option("No prompts: texts that the target begins by itself. Taken where no others are given.", _DATA, "--self"),
]
HeldOut = Annotated[
    list[Path] | None, _option("Prompts to measure on, in the same form; default: one in 20 of the others.", _DATA)
]
Mix = Annotated[
    str,
    _option(
        "Shares of rows that are known text, the target's continuations, and the draft's own continuations.", _DATA
    ),
]
Temperatures = Annotated[str, _option("Of continuations, comma-separated; each row draws one.", _DATA)]
Length = Annotated[int, _option("Most tokens of a row, prompt and continuation.", _DATA)]

Divergence = Annotated[
    Literal["kl", "rkl", "jsd", "tvd", "logacc"],
    _option(
        "What is made small: forward or reverse KL, Jensen-Shannon, total variation (1 - acceptance), -log acceptance.",
        _TRAINING,
    ),
]
Temperature = Annotated[float, _option("Temperature at which the two distributions are compared.", _TRAINING)]
Kept = Annotated[
    int, _option("Tokens of each of the target's distributions that are stored; the rest is one mass.", _TRAINING)
]
Steps = Annotated[int, _option("Optimizer steps.", _TRAINING)]
BatchRows = Annotated[int, _option("Rows of a step.", _TRAINING)]
MicroRows = Annotated[int, _option("Rows of one forward pass.", _TRAINING)]
RoundRows = Annotated[int, _option("Rows made at a time; those of the draft come from the draft of then.", _TRAINING)]
Passes = Annotated[float, _option("Times that a row is trained on, on average.", _TRAINING)]
Rate = Annotated[float, _option("Learning rate, relative to the optimizer's own.", _TRAINING)]
DraftTokens = Annotated[int, _option("Most tokens of a proposal, in the measurements.", _TRAINING)]
RunSeed = Annotated[int, _option("Other rows for another seed.", _TRAINING, "--seed")]
