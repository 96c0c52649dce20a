"""What launching a step ahead saves, as ratios within one run: the plain loop against the one that looks ahead.

    python benchmarks/overlap.py [--model DIR] [--device auto] [--sequences 1 8 32] [--output 128] [--rounds 5]

Steady decoding of equal greedy requests; rounds alternate. On a GPU the loop that looks ahead hides the host's work
behind the device's. On a CPU there is no such device: there the engine computes in a thread, and host and engine share
the cores.
"""

import argparse
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

from rich.console import Console
from rich.table import Table

from quire.core.config import EngineConfig, embedded_model
from quire.core.ids import RequestId
from quire.core.messages import EngineInfo
from quire.core.plan import BatchPlan, StepOutput
from quire.core.request import Request, SamplingParams
from quire.engine.engine import Engine, LaunchedStep
from quire.scheduler.client import load_in_process
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.loop import EngineLoop, StepEngine
from quire.scheduler.scheduler import Scheduler

PROMPT = 64
_names = count()


class ThreadedEngine:
    """Computes in one thread of its own."""

    is_asynchronous = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1)

    @property
    def info(self) -> EngineInfo:
        """The engine's own."""
        return self._engine.info

    def launch(self, plan: BatchPlan) -> Future[LaunchedStep]:
        """Queue the batch."""
        return self._thread.submit(self._engine.launch, plan)

    def finish(self, launched: Future[LaunchedStep]) -> StepOutput:
        """Wait for it."""
        return self._engine.finish(launched.result())


def decode_seconds(engine: StepEngine[Any], config: SchedulerConfig, ahead: bool, sequences: int, output: int) -> float:
    """Mean of the steps in which so many sequences decode, after their prompts."""
    loop = EngineLoop(engine, Scheduler(config), looks_ahead=ahead)
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    for number in range(sequences):
        ids = tuple((7 * i + number) % config.vocab_size for i in range(PROMPT))
        loop.submit(Request(id=RequestId(str(next(_names))), prompt_ids=ids, params=params))
    while loop.stats().generation_tokens_total < 2 * sequences:
        loop.step()
    started, steps = time.perf_counter(), loop.stats().steps_total
    while loop.has_work:
        loop.step()
    return (time.perf_counter() - started) / (loop.stats().steps_total - steps)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="What launching a step ahead saves.")
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    most = max(options.sequences)
    settings = EngineConfig(
        model=options.model, device=options.device, max_num_seqs=most, max_batch_tokens=PROMPT * most, max_waiting=most,
        prefix_cache=False, draft="none",
    )  # fmt: skip
    loop = load_in_process(settings)
    engine, config = loop.engine, loop.scheduler.config
    assert isinstance(engine, Engine)
    ahead: StepEngine[Any] = engine if engine.is_asynchronous else ThreadedEngine(engine)
    table = Table("sequences", "plain, ms per step", "ahead, ms per step", "ahead / plain", title=engine.info.device)
    for sequences in options.sequences:
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(options.rounds + 1):
            for looks, one in ((False, engine), (True, ahead)):
                seconds = decode_seconds(one, config, looks, sequences, options.output)
                if number:  # the first round warms up
                    times[looks].append(seconds)
        plain, fast = (statistics.median(times[looks]) * 1e3 for looks in (False, True))
        table.add_row(f"{sequences}", f"{plain:.3f}", f"{fast:.3f}", f"{fast / plain:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
