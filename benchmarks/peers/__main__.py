"""Quire beside the engines that people would otherwise choose, on this machine's CPU, in one run.

    python -m benchmarks.peers --cache FOLDER [--models quire-mini qwen2-0.5b] [--engines ...] [--rounds 5]

Each engine runs in an environment of its own under the cache folder (installed there when first needed, some GB), in a
process of its own that is stopped while it is not its turn. Engines take turns within a round, in another order each
round, so that a machine whose speed drifts favours none; ratios are those within a round. All get as many threads as
there are cores, the same checkpoint, the same random prompts of the round, and generate greedily past any end token.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from .cells import Cell, Prompts, Round, play, rows
from .checkpoints import MODELS, checkpoint
from .environments import ADAPTERS, PEERS, interpreter
from .resident import PeerFailed, Resident

START_LIMIT = 900.0
"""Seconds: the first start of some converts and compiles the model."""
ANSWER_LIMIT = 300.0
KV_BYTES = 1 << 30
WARM_UP = Cell(1, 16, 2)
"""Brings an engine back into the caches after it stood still."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was measured with one model."""

    model: str
    facts: dict[str, dict[str, str]]
    """Of each engine that started: its version and its types."""
    rounds: list[Round]


def start(name: str, model: Path, cells: Sequence[Cell], cache: Path) -> Resident:
    """Start an engine with a model; raises `PeerFailed`."""
    settings = {
        "model": str(model),
        "converted": str(cache / "models" / f"{model.name}-{name}"),
        "dtype": "bfloat16",
        "streams": max(cell.streams for cell in cells),
        "length": max(cell.prompt + cell.output for cell in cells) + 16,
        "kv_bytes": KV_BYTES,
        "threads": len(os.sched_getaffinity(0)),
    }
    logs = cache / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    print(f"starting {PEERS[name].title} with {model.name}", file=sys.stderr)
    log = logs / f"{model.name}-{name}.log"
    return Resident(interpreter(name, cache), ADAPTERS / f"{name}.py", settings, log, START_LIMIT)


def leave_out(name: str, error: PeerFailed) -> None:
    """Say so; without Quire there is nothing to compare."""
    if name == "quire":
        raise SystemExit(f"Quire: {error}")
    print(f"{PEERS[name].title} is left out: {error}", file=sys.stderr)


def one_round(engines: dict[str, Resident], cells: Sequence[Cell], vocabulary: int, number: int) -> Round:
    """Cell by cell, each engine in turn; one that fails is left out from then on."""
    results: Round = {}
    for cell in cells:
        names = list(engines)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            prompts = Prompts(vocabulary, seed=f"{number} {cell}")
            try:
                with engines[name].awake():
                    engines[name].generate(prompts.take(WARM_UP), WARM_UP.output, ANSWER_LIMIT)
                    results.setdefault(name, {})[cell] = play(engines[name], cell, prompts, ANSWER_LIMIT)
            except PeerFailed as error:
                leave_out(name, error)
                engines.pop(name).end()
    return results


def compare(model: str, cells: Sequence[Cell], args: argparse.Namespace) -> Comparison:
    """Start all engines and play the rounds, after an uncounted one of two tokens: what is made once is made then."""
    folder = checkpoint(model, args.cache / "models")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    engines: dict[str, Resident] = {}
    with ExitStack() as running:
        for name in args.engines:
            try:
                engines[name] = start(name, folder, cells, args.cache)
            except PeerFailed as error:
                leave_out(name, error)
                continue
            running.callback(engines[name].end)
        facts = {name: engine.facts for name, engine in engines.items()}
        one_round(engines, [replace(cell, output=min(cell.output, 2)) for cell in cells], vocabulary, 0)
        rounds = []
        for number in range(1, args.rounds + 1):
            print(f"{model}: round {number} of {args.rounds}", file=sys.stderr)
            rounds.append(one_round(engines, cells, vocabulary, number))
    return Comparison(model, facts, rounds)


def report(comparison: Comparison, cells: Sequence[Cell], names: Sequence[str]) -> str:
    """As a table in Markdown."""
    facts = comparison.facts
    heads = [f"{PEERS[name].title} {facts[name]['version']}" if name in facts else PEERS[name].title for name in names]
    lines = [f"### {comparison.model}", "", "| | " + " | ".join(heads) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(texts) + " |" for title, texts in rows(comparison.rounds, cells, names)]
    return "\n".join([*lines, "", *(f"- {PEERS[name].title}: {facts[name]['types']}" for name in facts), ""])


def machine() -> str:
    """What the figures depend on most."""
    info = Path("/proc/cpuinfo").read_text()
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    features = ", ".join(name for name in FEATURES if name in flags)
    return f"{date.today()}, {len(os.sched_getaffinity(0))} cores, {features}"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for environments, models and logs; some GB")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS), help="beside quire")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens generated for each")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the values of each round")
    args = parser.parse_args()
    args.cache = args.cache.resolve()
    args.engines = ["quire", *(name for name in args.engines if name != "quire")]
    return args


def main() -> None:
    """Compare with each model and print the tables."""
    args = parsed()
    cells = [Cell(streams, args.prompt, args.output) for streams in args.streams] + [Cell(1, args.long, 1)]
    (args.cache / "models").mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; prompts of {args.prompt} tokens, {args.output} generated\n")
    values = {}
    for model in args.models:
        comparison = compare(model, cells, args)
        print(report(comparison, cells, args.engines), flush=True)
        values[model] = [
            {name: {cell.title: value for cell, value in one.items()} for name, one in played.items()}
            for played in comparison.rounds
        ]
    if args.json:
        args.json.write_text(json.dumps(values))


if __name__ == "__main__":
    main()
