"""Memory pressure: requests finished in time per second when sequences are pruned instead of preempted, in one run.

    python -m benchmarks.pressure [--model DIR] [--overload 2] [--slo 4] [--keep 0.5] [--rounds 3] [--json FILE]

The pool holds a quarter of what the sequences that may run at once come to need. First the engine that preempts (and
computes again what it threw away) gets all requests at once: its throughput is the capacity. Then both engines get the
same requests, arriving at random times at `overload` times the capacity, and take turns: a round gives one ratio of
goodputs, and the median of the rounds is reported. A request counts if it ends within `slo` times what it takes alone
on the idle machine. Quality is the share of greedy tokens equal to those of a calm, unpruned run. Where the preempting
engine did not preempt there was no pressure, and nothing is reported.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.stepping import Prompts, drain, load
from quire.core.config import embedded_model
from quire.core.ids import RequestId
from quire.core.messages import EngineStats, Event, Failed, Finished, Tokens, single_events
from quire.core.pruning import PruneParams
from quire.core.request import Request
from quire.scheduler.loop import EngineLoop


@dataclass(slots=True)
class Outcome:
    """What an engine made of the arrivals."""

    goodput: float
    """Requests that ended in time, per second."""
    in_time: int
    throughput: float
    """Requests per second."""
    preemptions: int
    recomputed: float
    """Tokens of prompts and outputs computed, over those asked for."""
    agreement: float
    """Share of tokens equal to the calm run's."""


class Watcher:
    """Collects what each request gave and when it ended."""

    def __init__(self) -> None:
        self.tokens: dict[RequestId, list[int]] = {}
        self.ended: dict[RequestId, float] = {}
        self.rows = 0

    def watch(self, stats: EngineStats, events: Sequence[Event]) -> None:
        """Take in a step."""
        self.rows += stats.batch_tokens
        for event in events:
            assert not isinstance(event, Failed), event.error.message
            if isinstance(event, Tokens):
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if isinstance(event, Finished):
                self.ended[event.request_id] = time.perf_counter()


def arrive(loop: EngineLoop, requests: Sequence[Request], times: Sequence[float], watcher: Watcher) -> list[float]:
    """Submit each request at its time and run all to their ends; their latencies in seconds."""
    started, waiting = time.perf_counter(), list(zip(times, requests, strict=True))
    while waiting or loop.has_work:
        now = time.perf_counter() - started
        while waiting and waiting[0][0] <= now:
            loop.submit(waiting.pop(0)[1])
        if loop.has_work:
            report = loop.step()
            watcher.watch(report.stats, list(single_events(report.events)))
        else:
            time.sleep(max(0.0, waiting[0][0] - now))
    return [watcher.ended[one.id] - started - at for at, one in zip(times, requests, strict=True)]


def measure(
    loop: EngineLoop, requests: Sequence[Request], times: Sequence[float], limit: float, calm: Sequence[Sequence[int]]
) -> Outcome:
    """Run the arrivals; `limit`: seconds within which a request must end."""
    watcher, before = Watcher(), loop.stats().preemptions_total
    started = time.perf_counter()
    latencies = arrive(loop, requests, times, watcher)
    seconds = time.perf_counter() - started
    in_time = sum(latency <= limit for latency in latencies)
    asked = sum(len(one.prompt_ids) + (one.params.max_tokens or 0) - 1 for one in requests)
    equal = [
        sum(a == b for a, b in zip(watcher.tokens[one.id], reference, strict=True)) / len(reference)
        for one, reference in zip(requests, calm, strict=True)
    ]
    return Outcome(
        goodput=in_time / seconds,
        in_time=in_time,
        throughput=len(requests) / seconds,
        preemptions=loop.stats().preemptions_total - before,
        recomputed=watcher.rows / asked,
        agreement=statistics.mean(equal),
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model()), help="checkpoint folder")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=768, help="tokens to generate")
    parser.add_argument("--seqs", type=int, default=16, help="most sequences that run at once")
    parser.add_argument("--overload", type=float, default=2.0, help="arrivals over capacity")
    parser.add_argument("--slo", type=float, default=4.0, help="times the latency of a request alone")
    parser.add_argument("--policy", default="knorm")
    parser.add_argument("--keep", type=float, default=0.5, help="no sequence keeps less than this share")
    parser.add_argument("--floor", type=int, default=256, help="no head keeps fewer entries than this")
    parser.add_argument("--least-agreement", type=float, default=0.0, help="the quality floor, 0 to 1")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def calm_run(args: argparse.Namespace, requests: Sequence[Request]) -> tuple[float, list[list[int]], int]:
    """Latency of a request alone in seconds, the tokens of all, and the bytes that so many sequences come to need."""
    probe = load(args.model, max_num_seqs=1)
    latency = statistics.median(arrive(probe, [one], [0.0], Watcher())[0] for one in requests[:3])
    info = probe.engine.info
    bundle = info.model.num_layers * info.model.num_kv_heads * (info.kv_bytes // info.num_pages)
    needed = args.seqs * bundle * -(-(args.prompt + args.output) // info.page_size)
    watcher = Watcher()
    drain(load(args.model, max_num_seqs=args.seqs, kv_memory=needed), requests, watcher.watch)
    return latency, [watcher.tokens[one.id] for one in requests], needed


def main() -> None:
    """Measure and print; exits non-zero when quality falls below what was asked for."""
    args = arguments()
    prompts = Prompts(args.model)
    contexts = [prompts.take(args.prompt) for _ in range(args.requests)]
    prune = PruneParams(policy=args.policy, keep=args.keep, floor=args.floor, when="pressure")

    def requests(how: PruneParams | None = None) -> list[Request]:
        return [prompts.request(context, args.output, how) for context in contexts]

    latency, calm, needed = calm_run(args, requests())
    limit = args.slo * latency
    loops = {
        how: load(args.model, max_num_seqs=args.seqs, kv_memory=needed // 4, pressure=how)
        for how in ("preempt", "prune")
    }
    started = time.perf_counter()
    drain(loops["preempt"], requests(), lambda stats, events: None)
    capacity = args.requests / (time.perf_counter() - started)
    times = arrival_times(len(contexts), args.overload * capacity)
    rounds = [
        {how: measure(loop, requests(prune if how == "prune" else None), times, limit, calm) for how, loop in turn}
        for turn in turns(loops, args.rounds)
    ]
    if any(not one["preempt"].preemptions for one in rounds):
        sys.exit(
            "nobody was preempted, so there was no pressure: ask for more requests, longer outputs or more overload"
        )
    print(
        f"{args.requests} requests at {args.overload:g}x the capacity of {capacity:.2f}/s, pool {needed // 4:,} bytes"
    )
    print(f"in time: within {limit:.1f} s, {args.slo:g}x alone; {args.policy}, keep {args.keep:g}, floor {args.floor}")
    show(rounds)
    if args.json:
        figures = [{how: asdict(outcome) for how, outcome in one.items()} for one in rounds]
        content = {"arguments": vars(args), "capacity": capacity, "rounds": figures}
        args.json.write_text(json.dumps(content, default=str))
    agreement = min(one["prune"].agreement for one in rounds)
    if agreement < args.least_agreement:
        sys.exit(f"agreement {agreement:.0%} is below the floor of {args.least_agreement:.0%}")


def arrival_times(count: int, rate: float) -> list[float]:
    """Seconds, of a Poisson process with `rate` arrivals a second."""
    rng = random.Random(0)
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


def turns(loops: dict[str, EngineLoop], rounds: int) -> list[list[tuple[str, EngineLoop]]]:
    """The engines by name, in the other order in every second round."""
    order = list(loops.items())
    return [order if number % 2 == 0 else order[::-1] for number in range(rounds)]


def show(rounds: Sequence[dict[str, Outcome]]) -> None:
    """A row per way to relieve pressure, each figure the median of its rounds; then the median of the ratios."""
    table = Table("pressure", "in time/s", "in time", "requests/s", "preemptions", "rows/asked", "agreement")
    for how in ("preempt", "prune"):
        one = {name: statistics.median(getattr(r[how], name) for r in rounds) for name in asdict(rounds[0][how])}
        cells = [f"{one['goodput']:.2f}", f"{one['in_time']:g}", f"{one['throughput']:.2f}", f"{one['preemptions']:g}"]
        table.add_row(how, *cells, f"{one['recomputed']:.2f}", f"{one['agreement']:.0%}")
    # Nobody in time: no ratio is large enough.
    goodput = ratio([(r["prune"].goodput, r["preempt"].goodput) for r in rounds])
    throughput = ratio([(r["prune"].throughput, r["preempt"].throughput) for r in rounds])
    table.add_row("prune / preempt", f"{goodput:.2f}x", "", f"{throughput:.2f}x", "", "", "")
    Console(width=120).print(table)


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Median of the quotients; where nothing is divided by, infinity."""
    return statistics.median(a / b if b else float("inf") for a, b in pairs)


if __name__ == "__main__":
    main()
