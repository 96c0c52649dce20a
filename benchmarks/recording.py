"""What a log of what the model says (`quire serve --distill-log`) costs, as ratios within one run.

    python -m benchmarks.recording [--model DIR] [--device auto] [--sequences 1 8 32] [--output 128] [--rounds 5]

Steady decoding of equal greedy requests, of which a share is recorded; rounds alternate between the shares. A step is
the engine process's: computing, and packing its report for the server. `server` is what taking and writing the rows
takes there, in microseconds per recorded token; a step of the engine does not wait for it. `logprobs` is the same
requests asking for 20 `logprobs` instead: what recording would cost if it were that.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.stepping import Prompts, load
from quire.core.config import embedded_model
from quire.core.messages import Recorded, single_events
from quire.core.request import MAX_TOP_LOGPROBS, Request
from quire.scheduler.loop import EngineLoop
from quire.scheduler.scheduler import Scheduler
from quire.server.traffic_log import TrafficLog

PROMPT = 64


@dataclass(frozen=True, slots=True)
class Way:
    """How requests are told what the model says."""

    share: float
    logprobs: int | None = None

    def __str__(self) -> str:
        return f"recorded {self.share:.0%}" if self.logprobs is None else "logprobs"

    def apply(self, request: Request, number: int) -> Request:
        """Request number `number` as it is to be."""
        params = msgspec.structs.replace(request.params, logprobs=self.logprobs)
        recorded = int((number + 1) * self.share) > int(number * self.share)
        return msgspec.structs.replace(request, params=params, record=recorded)


@dataclass(frozen=True, slots=True)
class Times:
    """Of one run."""

    step: float
    """Seconds, mean of the steps in which all decode."""
    server: float
    """Seconds per recorded token."""


def measure(loop: EngineLoop, requests: list[Request], path: Path) -> Times:
    """Run the requests; the first steps, with their prompts, do not count."""
    loop = EngineLoop(loop.engine, Scheduler(loop.scheduler.config), looks_ahead=loop.engine.is_asynchronous)
    log = TrafficLog(path, share=0.0)
    entries = {request.id: log.entry(request) for request in requests if request.record}
    encoder, rows, server = msgspec.msgpack.Encoder(), 0, 0.0
    for request in requests:
        loop.submit(request)
    while loop.stats().generation_tokens_total < 2 * len(requests):
        loop.step()
    steps, engine = 0, 0.0
    while loop.has_work:
        started = time.perf_counter()
        report = loop.step()
        encoder.encode(report)
        told = time.perf_counter()
        events = [event for event in single_events(report.events) if event.request_id in entries]
        taking = time.perf_counter()
        for event in events:
            entries[event.request_id].take(event)
            rows += isinstance(event, Recorded) and len(event.rows)
        steps, engine, server = steps + 1, engine + told - started, server + time.perf_counter() - taking
    closing = time.perf_counter()
    for entry in entries.values():
        entry.close()
    return Times(engine / steps, (server + time.perf_counter() - closing) / max(1, rows))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="What recording what the model says costs.")
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    loop = load(options.model, device=options.device, max_num_seqs=max(options.sequences))
    all_ways = [Way(0.0), *(Way(share) for share in options.shares), Way(0.0, MAX_TOP_LOGPROBS)]
    table = Table(
        "sequences", "", "ms per step", "/ not recorded", "server, us per token", title=loop.engine.info.device
    )
    prompts = Prompts(options.model)
    with TemporaryDirectory() as folder:
        for count in options.sequences:
            ways = [way for way in all_ways if not way.share or way.share * count >= 1]
            found: dict[Way, list[Times]] = defaultdict(list)
            for turn in range(options.rounds + 1):
                for way in random.Random(turn).sample(ways, len(ways)):
                    asked = [prompts.request(prompts.take(PROMPT), options.output, None) for _ in range(count)]
                    times = measure(loop, [way.apply(r, i) for i, r in enumerate(asked)], Path(folder) / "log")
                    if turn:  # the first one warms up
                        found[way].append(times)
            plain = [times.step for times in found[ways[0]]]
            for way in ways:
                step = statistics.median(times.step for times in found[way])
                ratio = statistics.median(t.step / p for t, p in zip(found[way], plain, strict=True))
                server = statistics.median(times.server for times in found[way]) * 1e6
                table.add_row(
                    f"{count}", str(way), f"{step * 1e3:.3f}", f"{ratio:.3f}", f"{server:.1f}" if way.share else ""
                )
    Console().print(table)


if __name__ == "__main__":
    main()
