"""Quire's server beside other engines' on this machine's CPU, all under the same load.

    python -m benchmarks.serving.peers --cache FOLDER [--model quire-mini] [--servers vllm] [--rounds 3]

Servers run in environments of their own under the cache folder (made when first needed, some GB) and are stopped while
it is not their turn. They take turns load by load, in another order each round; ratios are those within a round. All
get as many threads as there are cores, the same checkpoint and prompts of the same lengths, and generate greedily past
any end token. Models: quire-mini, or quire-mini enlarged to the cost of one of `benchmarks.upscale`'s presets.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from quire.core.config import embedded_model

from ..intervals import median_interval
from ..peers.environments import PEERS, interpreter
from ..upscale import PRESETS, cached
from .__main__ import Figures, Measurement, measure_all
from .client import Server
from .load import Load, Shape
from .servers import ServerFailed, ServerProcess, end_with_servers, free_port

CORES = sorted(os.sched_getaffinity(0))
MODEL_LENGTH = 4096
ROWS = {
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "first token, median, ms",
    "median_itl_ms": "next tokens, median, ms",
    "p99_itl_ms": "next tokens, p99, ms",
}
"""Of the table."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a server is started."""

    arguments: Callable[[Path, int, int], list[str]]
    """Of Python, given model, port and most sequences at once."""
    ready: str
    """Path that is answered with 200 once it serves."""
    environment: dict[str, str] = field(default_factory=dict)


def _quire(model: Path, port: int, sequences: int) -> list[str]:
    options = ["--draft", "none", "--dtype", "bfloat16", "--kv-memory", "1GiB", "--max-num-seqs", str(sequences)]
    return ["-m", "quire.server", "serve", str(model), "--port", str(port), *options]


def _vllm(model: Path, port: int, sequences: int) -> list[str]:
    options = ["--dtype", "bfloat16", "--max-model-len", str(MODEL_LENGTH), "--max-num-seqs", str(sequences)]
    options += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(1 << 30)]
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]


SERVERS = {
    "quire": Start(_quire, "/ready"),
    # Left to itself it keeps a core of two for its other processes.
    "vllm": Start(_vllm, "/health", {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, CORES))}),
}
"""By their names in `benchmarks.peers`."""
Round = dict[str, dict[str, Figures]]
"""By server and load."""


def started(name: str, model: Path, sequences: int, cache: Path) -> ServerProcess:
    """A server with a model; raises `ServerFailed`."""
    print(f"starting {PEERS[name].title} with {model.name}", file=sys.stderr)
    start, port = SERVERS[name], free_port()
    (cache / "logs").mkdir(parents=True, exist_ok=True)
    log = cache / "logs" / f"{model.name}-{name}-server.log"
    command = [str(interpreter(name, cache)), *start.arguments(model, port, sequences)]
    return ServerProcess(command, port, start.ready, log, start.environment)


def one_round(servers: dict[str, ServerProcess], loads: Sequence[Load], args: argparse.Namespace, number: int) -> Round:
    """Load by load, each server in turn. Raises `SystemExit` when a request fails: there is nothing to compare then."""
    results: Round = {name: {} for name in servers}
    names = list(servers)
    first = number % len(names)
    shape = Shape(args.input_len, args.output_len)
    for index, load in enumerate(loads):
        for name in names[first:] + names[:first]:
            with servers[name].awake(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                seed = number * len(loads) + index
                what = Measurement(shape, args.seconds, seed, server_cpu=servers[name].cpu_seconds)
                results[name] |= runner.run(measure_all(Server(servers[name].url), [load], what))
            if results[name][load.title]["failed"]:
                raise SystemExit(f"{PEERS[name].title}: requests failed at {load.title}")
    return results


def table(rounds: Sequence[Round], loads: Sequence[Load], names: Sequence[str]) -> str:
    """In Markdown: medians of the rounds, and how many times as fast Quire was, with its interval of 95 %."""
    lines = ["| | " + " | ".join(PEERS[name].title for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for load in loads:
        for key, title in ROWS.items():
            texts = [_text(rounds, load.title, key, name) for name in names]
            lines.append(f"| {load.title}: {title} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _text(rounds: Sequence[Round], load: str, key: str, name: str) -> str:
    ours, theirs = ([one[who][load][key] for one in rounds] for who in ("quire", name))
    median = statistics.median(theirs)
    text = f"{median:,.0f}" if median >= 100 else f"{median:.1f}"
    if name == "quire":
        return text
    ratios = [o / t if key == "output_throughput" else t / o for o, t in zip(ours, theirs, strict=True)]
    low, high = median_interval(ratios)
    return f"{text} ({statistics.median(ratios):.2f}x, {low:.2f} to {high:.2f})"


def main() -> None:
    """Start all servers, play the rounds, print the table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.serving.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for environments and logs; some GB")
    parser.add_argument("--model", choices=["quire-mini", *PRESETS], default="quire-mini")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="beside quire")
    parser.add_argument("--max-concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load; what has begun by then is finished")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures of all rounds")
    args = parser.parse_args()
    end_with_servers()
    cache, names = args.cache.resolve(), ["quire", *(name for name in args.servers if name != "quire")]
    model = embedded_model() if args.model == "quire-mini" else cached(embedded_model(), args.model)
    loads = [Load(concurrency=clients) for clients in args.max_concurrency]
    with ExitStack() as running:
        servers = {}
        for name in names:
            try:
                servers[name] = started(name, model, max(args.max_concurrency), cache)
            except ServerFailed as error:
                raise SystemExit(f"{PEERS[name].title}: {error}") from error
            running.callback(servers[name].end)
        rounds = [one_round(servers, loads, args, number) for number in range(args.rounds)]
    print(table(rounds, loads, names))
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
