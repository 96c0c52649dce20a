"""What users get over HTTP: throughput and latencies of an OpenAI-compatible server under load.

    python -m benchmarks.serving [--max-concurrency 1 8 32] [--request-rate 2] [-- options of quire serve]
    python -m benchmarks.serving --url http://HOST:PORT --model NAME --goodput ttft:500 itl:50 --json out.json

Without --url `quire serve` is started. Each load lasts --seconds, after an uncounted one of two requests. Requests are
streamed chat completions of set lengths, of random words that no prefix cache has. Figures have the names that
`vllm bench serve` gives them; itl is the time between two texts of a stream, which may be of several tokens. A failed
request is counted, and the exit code is 1.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from .answers import Failure, read
from .client import Server
from .load import Load, Prompts, Shape, measured_lengths, run
from .results import LATENCIES, Spent, parse_limits, summary
from .servers import ServerFailed, ServerProcess, end_with_servers, free_port

Figures = dict[str, float]
ROWS = {
    "completed": "requests completed",
    "failed": "requests failed",
    "request_throughput": "requests/s",
    "request_goodput": "good requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "tokens/s, prompts included",
    **{f"{kind}_{name}_ms": f"{name}, {kind}, ms" for name in LATENCIES for kind in ("median", "p95", "p99")},
    "client_cores": "cores busy: this program",
    "server_cores": "cores busy: the server",
}
"""Of the table."""


def own_cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is the same for all loads of a server."""

    shape: Shape
    seconds: float
    """Of each load."""
    seed: int = 0
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of good answers, in milliseconds."""
    server_cpu: Callable[[], float] | None = None
    """Processor time of the server's processes so far, where they are known."""


async def measure_all(server: Server, loads: Sequence[Load], what: Measurement) -> dict[str, Figures]:
    """Play all loads. Raises `OSError` if the server cannot be asked at all."""
    if not server.model:
        models = await server.fetch("/v1/models")
        server = replace(server, model=models["data"][0]["id"])
    prompts = Prompts(server, what.shape, await measured_lengths(server), what.seed)
    return {load.title: await measure(server, load, prompts, what) for load in loads}


async def measure(server: Server, load: Load, prompts: Prompts, what: Measurement) -> Figures:
    """Play one load, after two uncounted requests."""
    await run(server, Load(concurrency=2), prompts, 0)
    server_cpu = what.server_cpu or (lambda: 0.0)
    own, theirs, started = own_cpu_seconds(), server_cpu(), time.perf_counter()
    exchanges = await run(server, load, prompts, what.seconds)
    seconds = time.perf_counter() - started
    spent = Spent(
        seconds,
        client_cores=(own_cpu_seconds() - own) / seconds,
        server_cores=(server_cpu() - theirs) / seconds if what.server_cpu else None,
    )
    answers = [read(exchange) for exchange in exchanges]
    for reason in sorted({answer.reason for answer in answers if isinstance(answer, Failure)}):
        print(f"{load.title}: {reason}", file=sys.stderr)
    return summary(answers, spent, what.limits)


def table(results: dict[str, Figures]) -> Table:
    """A column per load."""
    shown = Table("", *results)
    for key, title in ROWS.items():
        if any(key in figures for figures in results.values()):
            values = [figures.get(key) for figures in results.values()]
            shown.add_row(title, *("-" if value is None else f"{value:,.{_digits(value)}f}" for value in values))
    return shown


def _digits(value: float) -> int:
    return 0 if value == int(value) or value >= 1000 else 1 if value >= 10 else 2


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of the server, without /v1; default: start quire serve")
    parser.add_argument("--model", default="", help="name of the model there; default: the first one it lists")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--max-concurrency", type=int, nargs="*", default=None, help="clients of closed loops")
    parser.add_argument("--request-rate", type=float, nargs="*", default=[], help="requests per second of open loops")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load; what has begun by then is finished")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens generated for each")
    parser.add_argument("--prefix-len", type=int, default=0, help="tokens of the prompts that all share")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help=f"limits of {', '.join(LATENCIES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("serve", nargs="*", help="after --: what quire serve is started with")
    args = parser.parse_args()
    if args.max_concurrency is None:
        args.max_concurrency = [] if args.request_rate else [1, 8, 32]
    if args.url and args.serve:
        parser.error("options of quire serve are of no use with --url")
    try:
        args.goodput = parse_limits(args.goodput)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    """Measure and print; 1 if a request failed."""
    end_with_servers()
    args = parsed()
    loads = [Load(concurrency=clients) for clients in args.max_concurrency]
    loads += [Load(rate=rate) for rate in args.request_rate]
    with ExitStack() as running, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            url, server_cpu = args.url, None
            if not url:
                port = free_port()
                command = [sys.executable, "-m", "quire.server", "serve", *args.serve, "--port", str(port)]
                log = Path(tempfile.gettempdir()) / f"quire-serve-{port}.log"
                quire = ServerProcess(command, port, "/ready", log)
                running.callback(log.unlink)
                running.callback(quire.end)
                running.enter_context(quire.awake())
                url, server_cpu = quire.url, quire.cpu_seconds
            shape = Shape(args.input_len, args.output_len, args.prefix_len, args.temperature)
            what = Measurement(shape, args.seconds, args.seed, args.goodput, server_cpu)
            results = runner.run(measure_all(Server(url, args.model, args.api_key), loads, what))
        except (OSError, ServerFailed) as error:
            raise SystemExit(f"{args.url or 'quire serve'}: {error}") from error
    lengths = f"prompts of about {args.input_len} tokens, {args.output_len} generated"
    Console(width=120).print(f"{lengths}, {os.cpu_count()} cores here", table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 1 if any(figures["failed"] for figures in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
