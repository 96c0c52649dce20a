"""`quire eval-pruning`: load a model, run the sweep with progress, write results, plots and a table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..core.config import embedded_model
from ..core.errors import InvalidRequestError, QuireError
from ..core.messages import EngineInfo
from ..core.pruning import PruneParams
from ..evaluation.cells import Cell, Setting
from ..evaluation.material import Material, TextFormat
from ..evaluation.plots import draw, require_matplotlib
from ..evaluation.report import tables, write_json
from ..evaluation.sweep import Sweep
from ..evaluation.tasks import TASKS
from .llm import LLM

Item = TypeVar("Item")
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
    return EvalOptions(prune=prune | {"refine": tuple(rest.pop("refine"))}, engine=engine, **rest)


def evaluate(options: EvalOptions) -> None:
    """Run it all. Raises `QuireError` for what cannot be measured, before anything is."""
    require_matplotlib()
    _make_folder(options.out)
    llm = LLM(options.model, max_num_seqs=1, max_batch_tokens=options.chunk, prefix_cache=False, **options.engine)
    text_format = options.text_format or ("code" if llm.info.model.name == str(embedded_model()) else "prose")
    sweep = Sweep(
        settings=settings(options, llm.info),
        tasks=tasks(options),
        lengths=options.lengths or default_lengths(llm.info.max_model_len),
        samples=options.samples,
        chunk=options.chunk,
        seed=options.seed,
    )
    found = _run(llm, Material(llm.tokenizer, text_format), sweep)
    results = options.out / "results.json"
    write_json(results, found, sweep, llm.info, text_format)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    for table in tables(found):
        console.print(table)
    for path in [results, *draw(options.out, found)]:
        print(path)


def settings(options: EvalOptions, info: EngineInfo) -> list[Setting]:
    """Every policy with every share kept; all that the model can be pruned by if none is named."""
    for name in options.policies:
        if name not in info.policies:
            raise InvalidRequestError(f"unknown pruning policy {name!r}; known: {', '.join(info.policies)}")
        if obstacle := info.policies[name].obstacle:
            raise InvalidRequestError(f"policy {name!r} is not for this model: {obstacle}")
    policies = options.policies or [name for name, policy in info.policies.items() if policy.obstacle is None]
    try:
        asked = [
            msgspec.convert({"policy": name, "keep": keep} | options.prune, PruneParams)
            for name in policies
            for keep in options.keeps
        ]
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"pruning: {error}") from error
    return [Setting(params.policy, params.keep, params) for params in asked if params.forgets]


def tasks(options: EvalOptions) -> list[str]:
    """Those asked for, or all that can be measured."""
    scored = [name for name, task in TASKS.items() if task.tail]
    if options.prune["chunked"]:
        return options.tasks or list(TASKS)
    for name in set(options.tasks).intersection(scored):
        raise InvalidRequestError(f"task {name!r} looks at a cache that was pruned before the prompt's end: --chunked")
    return options.tasks or [name for name in TASKS if name not in scored]


def default_lengths(context: int) -> list[int]:
    """Powers of two from 512 to half of the context, and seven eighths of it in round numbers."""
    lengths = [2**power for power in range(9, 31) if 2**power <= context // 2]
    return [*lengths, context * 7 // 8 // 100 * 100]


def items(text: str, kind: Callable[[str], Item], option: str) -> list[Item]:
    """The items of a list separated by commas. Raises `InvalidRequestError` naming the option."""
    try:
        return [kind(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise InvalidRequestError(f"{option} must be a list separated by commas, got {text!r}") from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuireError(f"cannot write to {path}: {error.strerror}") from error


def _run(llm: LLM, material: Material, sweep: Sweep) -> list[Cell]:
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loading", total=sweep.prompts)

        def tick(what: str) -> None:
            bar.update(task, advance=1, description=what)

        return list(sweep.run(llm, material, tick))
