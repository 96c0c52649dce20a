"""What the prefix cache saves and what it costs, as ratios within one run.

    python benchmarks/prefix.py [--model DIR] [--shared 1024] [--requests 16] [--rounds 3] [--skip-model]

Three tables: time to first token of requests that share a beginning, with a cold cache and a warm one; the time to look
up a long prompt; and the scheduler's time per step (plan and commit, no model) with the cache and without.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from quire.core.config import EngineConfig, embedded_model
from quire.core.ids import RequestId
from quire.core.messages import Tokens, single_events
from quire.core.plan import BatchPlan, SequenceOutput, StepOutput
from quire.core.prefix import BlockHashes, PrefixIndex
from quire.core.request import Request, SamplingParams
from quire.scheduler.client import load_in_process
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.loop import EngineLoop
from quire.scheduler.scheduler import Scheduler

PAGE = 16
_names = count()


def request(prompt: list[int], **params: Any) -> Request:
    """A greedy request of a fresh name."""
    settings = SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | params)
    return Request(id=RequestId(str(next(_names))), prompt_ids=tuple(prompt), params=settings)


def milliseconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def first_tokens(loop: EngineLoop, requests: list[Request]) -> list[float]:
    """Milliseconds from submission to the first token of each of the requests, submitted together."""
    started = time.perf_counter()
    times: dict[RequestId, float] = {}
    for one in requests:
        loop.submit(one)
    while loop.has_work:
        for event in single_events(loop.step().events):
            if isinstance(event, Tokens):
                times.setdefault(event.request_id, (time.perf_counter() - started) * 1e3)
    return [times[one.id] for one in requests]


def prompts_of_a_round(rng: random.Random, vocab: int, shared: int, requests: int) -> list[list[int]]:
    """Prompts with the same `shared` first tokens and 32 of their own."""
    opening = [rng.randrange(vocab) for _ in range(shared)]
    return [opening + [rng.randrange(vocab) for _ in range(32)] for _ in range(requests)]


def time_to_first_token(model: str, shared: int, requests: int, rounds: int) -> Table:
    """Cold and warm, one after another; then all at once, with the cache and without, rounds alternating."""
    loops = {
        kept: load_in_process(EngineConfig(model=model, prefix_cache=kept, draft="none")) for kept in (True, False)
    }
    rng, cold, warm = random.Random(1), [], []
    together: dict[bool, list[float]] = {True: [], False: []}
    vocab = loops[True].engine.info.model.vocab_size
    for _ in range(rounds):
        first, *others = prompts_of_a_round(rng, vocab, shared, requests)
        cold += first_tokens(loops[True], [request(first, max_tokens=1)])
        for prompt in others:
            warm += first_tokens(loops[True], [request(prompt, max_tokens=1)])
        prompts = prompts_of_a_round(rng, vocab, shared, requests)
        for kept, loop in loops.items():
            together[kept].append(
                statistics.mean(first_tokens(loop, [request(prompt, max_tokens=1) for prompt in prompts]))
            )
    table = Table("time to first token", "ms", "ratio", title=f"{requests} requests sharing {shared:,} tokens")
    row(table, "cold, alone", statistics.median(cold), None)
    row(table, "warm, alone", statistics.median(warm), statistics.median(cold))
    row(table, "all at once, no cache (mean)", statistics.median(together[False]), None)
    row(table, "all at once, empty cache (mean)", statistics.median(together[True]), statistics.median(together[False]))
    return table


def look_up(length: int = 32_768, rounds: int = 30) -> Table:
    """Of a prompt that is wholly known, of one looked up again, and of one that nobody knows; best of the rounds."""
    rng = random.Random(2)
    known, unknown = ([rng.randrange(50_000) for _ in range(length)] for _ in range(2))
    index, blocks = PrefixIndex(1), length // PAGE
    for digest in BlockHashes((), known, PAGE).upto(blocks):
        index.publish(digest, np.zeros(1, np.int32))
    again = BlockHashes((), known, PAGE)
    assert len(index.match(again, blocks)) == blocks
    cases = {
        "known, first look": lambda: index.match(BlockHashes((), known, PAGE), blocks),
        "known, looked up again": lambda: index.match(again, blocks),
        "unknown": lambda: index.match(BlockHashes((), unknown, PAGE), blocks),
    }
    table = Table("prompt", "ms", "ratio", title=f"looking up {length:,} tokens in blocks of {PAGE}")
    times = {name: min(milliseconds(work) for _ in range(rounds)) for name, work in cases.items()}
    for name, taken in times.items():
        row(table, name, taken, times["known, first look"])
    return table


def step_times(scheduler: Scheduler, steps: int) -> list[float]:
    """Milliseconds of plan and commit of each of `steps` steps."""

    def compute(plan: BatchPlan) -> StepOutput:
        outputs = tuple(SequenceOutput((7,) if part.sample else ()) for part in plan.sequences)
        return StepOutput(outputs, decoded=np.full(len(plan.decodes), 7, np.int32))

    times = []
    for _ in range(steps):
        started = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        assert plan is not None
        output = compute(plan)
        computed = time.perf_counter()
        scheduler.commit(plan, output)
        times.append((planned - started + time.perf_counter() - computed) * 1e3)
    return times


def busy_scheduler(kept: bool, sequences: int) -> Scheduler:
    """So many sequences decoding, of a model with 32 layers of 8 kv heads."""
    config = SchedulerConfig(
        num_pages=32 * 8 * sequences * 24,
        page_size=PAGE,
        num_layers=32,
        num_kv_heads=8,
        windows=(None,) * 32,
        max_num_seqs=sequences,
        max_batch_tokens=8192,
        max_waiting=sequences,
        max_model_len=4096,
        vocab_size=50_000,
        eos_token_ids=(),
        prefix_cache=kept,
    )
    scheduler, rng = Scheduler(config), random.Random(3)
    for _ in range(sequences):
        scheduler.add(request([rng.randrange(50_000) for _ in range(rng.randint(100, 130))], max_tokens=200))
    while scheduler.stats().waiting or any(sequence.num_pending > 1 for sequence in scheduler._running):
        step_times(scheduler, 1)
    return scheduler


def scheduling(sequences: int = 256, rounds: int = 3) -> Table:
    """Mean over the steps in which each sequence fills two pages, rounds alternating; median of the rounds."""
    schedulers = {kept: busy_scheduler(kept, sequences) for kept in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for kept, scheduler in schedulers.items():
            times[kept].append(statistics.mean(step_times(scheduler, 2 * PAGE)))
    table = Table("prefix cache", "ms per step", "ratio", title=f"plan and commit, {sequences} sequences decoding")
    row(table, "off", statistics.median(times[False]), None)
    row(table, "on", statistics.median(times[True]), statistics.median(times[False]))
    return table


def row(table: Table, name: str, value: float, base: float | None) -> None:
    """One line; the ratio is to `base`."""
    table.add_row(name, f"{value:,.3f}", "" if base is None else f"{value / base:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model()), help="checkpoint folder")
    parser.add_argument("--shared", type=int, default=1024, help="tokens that all prompts begin with")
    parser.add_argument("--requests", type=int, default=16, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; each has a new beginning")
    parser.add_argument("--skip-model", action="store_true", help="only what needs no model")
    args = parser.parse_args()
    console = Console()
    console.print(look_up())
    console.print(scheduling())
    if not args.skip_model:
        console.print(time_to_first_token(args.model, args.shared, args.requests, args.rounds))


if __name__ == "__main__":
    main()
