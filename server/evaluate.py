"""`quire eval-pruning`: load a model, run the sweep with progress, write results, plots and a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..core.config import embedded_model
from ..core.errors import InvalidRequestError, QuireError
from ..core.messages import EngineInfo
from ..core.pruning import Budget, PruneParams, Refinement
from ..evaluation.cells import Cell, Setting
from ..evaluation.material import Material, TextFormat
from ..evaluation.plots import draw, require_matplotlib
from ..evaluation.report import describe, read_cells, tables, write_json
from ..evaluation.sweep import Sweep
from ..evaluation.tasks import TASKS
from .lists import items
from .llm import LLM

TABLE_WIDTH = 200
"""Characters; a narrower terminal folds lines, which beats cut figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What the command was asked for; None and empty lists take what suits the model."""

    model: str | None
    policies: list[str]
    keeps: list[float]
    prune: dict[str, Any]
    """Further fields of `core.pruning.PruneParams`, for all settings."""
    tasks: list[str]
    lengths: list[int]
    samples: int
    chunk: int
    unseen: bool
    """Whether questions come after the pruning."""
    seed: int
    text_format: TextFormat | None
    out: Path
    engine: dict[str, Any]
    """Fields of `core.config.EngineConfig`."""


def eval_options(options: dict[str, Any]) -> EvalOptions:
    """From the command's options by name. Raises `InvalidRequestError` for a list that is none."""
    rest = dict(options)
    prune = {name: rest.pop(name) for name in ("budget", "threshold", "floor", "window", "chunked")}
    engine = {name: rest.pop(name) for name in ("device", "dtype", "runner", "attention_backend", "trust_remote_code")}
    for name, kind in (("policies", str), ("keeps", float), ("tasks", str), ("lengths", int), ("refine", str)):
        rest[name] = items(rest[name], kind, f"--{name}")
    rest["unseen"] = rest.pop("question") == "unseen"
    return EvalOptions(prune=prune | {"refine": tuple(rest.pop("refine"))}, engine=engine, **rest)


def evaluate(options: EvalOptions) -> None:
    """Run it all. Raises `QuireError` for what cannot be measured, before anything is."""
    require_matplotlib()
    _make_folder(options.out)
    llm = LLM(
        options.model,
        max_num_seqs=1,
        max_batch_tokens=options.chunk,
        prefix_cache=False,
        draft="none",
        **options.engine,
    )
    text_format = options.text_format or ("code" if llm.info.model.name == str(embedded_model()) else "prose")
    sweep = Sweep(
        settings=settings(options, llm.info),
        tasks=options.tasks or list(TASKS),
        lengths=options.lengths or default_lengths(llm.info.max_model_len),
        samples=options.samples,
        chunk=options.chunk,
        seed=options.seed,
        unseen=options.unseen,
    )
    results = options.out / "results.json"
    found = _run(llm, Material(llm.tokenizer, text_format), sweep, results)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    for table in tables(found):
        console.print(table)
    for path in [results, *draw(options.out, found)]:
        print(path)


def settings(options: EvalOptions, info: EngineInfo) -> list[Setting]:
    """Every policy with every share kept; all that the model can be pruned by if none is named.

    A policy may name its own budget behind a slash.
    """
    policies = options.policies or [name for name, policy in info.policies.items() if policy.obstacle is None]
    found = []
    for policy in policies:
        name, _, budget = policy.partition("/")
        _check_known("pruning policy", name, info.policies)
        if obstacle := info.policies[name].obstacle:
            raise InvalidRequestError(f"policy {name!r} is not for this model: {obstacle}")
        fields = options.prune | ({"budget": budget} if budget else {})
        _check_known("budget", fields["budget"], get_args(Budget))
        for refinement in fields["refine"]:
            _check_known("refinement", refinement, get_args(Refinement))
        found += [Setting(policy, keep, PruneParams(policy=name, keep=keep, **fields)) for keep in options.keeps]
    return [setting for setting in found if setting.params and setting.params.forgets]


def _check_known(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise InvalidRequestError(f"unknown {kind} {name!r}; known: {', '.join(known)}")


def default_lengths(context: int) -> list[int]:
    """Powers of two from 512 to half of the context, and seven eighths of it in round numbers."""
    lengths = [2**power for power in range(9, 31) if 2**power <= context // 2]
    return [*lengths, context * 7 // 8 // 100 * 100]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuireError(f"cannot write to {path}: {error.strerror}") from error


def _run(llm: LLM, material: Material, sweep: Sweep, results: Path) -> list[Cell]:
    """Measure what `results` does not hold yet, and write it there as it is done: a sweep may take hours."""
    about = describe(sweep, llm.info, material.format)
    known = read_cells(results, about)
    found: list[Cell] = []
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Transient: if the sweep ends by an error, that stands alone.
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=sweep.prompts)

        def tick(what: str) -> None:
            bar.update(task, advance=1, description=what)

        for more in sweep.run(llm, material, tick, known):
            found += more
            done = {cell.key for cell in found}
            write_json(results, [*found, *(cell for cell in known if cell.key not in done)], about)
    return found
