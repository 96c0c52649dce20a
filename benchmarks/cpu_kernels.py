"""The CPU kernels beside the machine's memory bandwidth and plain torch, and where a decode step's time goes.

    python benchmarks/cpu_kernels.py [--dtype bfloat16] [--seconds 0.2] [--context 2048] [--batches 1 8 32]

Every number is the fastest of the runs that fit into `--seconds`: whatever else the machine does only adds time.
Contenders of one row run right after each other. `torch` is `F.linear`, which packs the weights anew on each call, and
the reference attention, which gathers the pages and calls `scaled_dot_product_attention`.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from quire.core.config import EngineConfig, embedded_model
from quire.core.ids import SlotId
from quire.core.plan import BatchPlan, PageGrants, SequencePlan, SlotAssignment
from quire.core.request import SamplingParams
from quire.engine.engine import Engine
from quire.kernels.attention import paged_attention
from quire.kernels.attention_cpu import PagedStep
from quire.kernels.cpu_library import loaded_library
from quire.kernels.linear import linear

Contender = Callable[[], object]
KV_HEADS, GROUP, HEAD_DIM, PAGE = 8, 4, 128, 16
SHAPES = {"448 -> 2048 (quire-mini)": (448, 2048), "4096 -> 4096 (8B model)": (4096, 4096)}
PROMPT = 128


def fastest(run: Contender, seconds: float) -> float:
    """Seconds of the fastest run, after one that does not count."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def read_bandwidth(seconds: float) -> float:
    """Bytes per second of summing 512 MiB, which no cache holds."""
    numbers = torch.ones(2**27)
    return numbers.nbytes / fastest(numbers.sum, seconds)


def linear_table(dtype: torch.dtype, seconds: float, bandwidth: float) -> Table:
    """Rates of the linear layer at one, few and many rows."""
    table = Table("linear", "rows", "GFLOP/s", "weights GB/s", "of memory bandwidth", "torch / own")
    for name, (inputs, outputs) in SHAPES.items():
        weight = torch.randn(outputs, inputs).to(dtype)
        for rows in (1, 32, 512):
            x = torch.randn(rows, inputs).to(dtype)
            own = fastest(partial(linear, x, weight, backend="cpu"), seconds)
            other = fastest(partial(F.linear, x, weight), seconds)
            rate = weight.nbytes / own
            flops = 2 * rows * weight.numel() / own
            share = f"{rate / bandwidth:.0%}" if rows == 1 else ""
            table.add_row(name, str(rows), f"{flops / 1e9:.0f}", f"{rate / 1e9:.1f}", share, f"{other / own:.2f}x")
    return table


def attention_case(sequences: int, new: int, held: int, dtype: torch.dtype) -> tuple[Contender, Contender, int]:
    """Own and reference attention over a pool in shuffled pages, and the bytes of keys and values that are read."""
    pages = -(-(held + new) // PAGE)
    shape = (sequences, 1, KV_HEADS, pages)
    total = sequences * KV_HEADS * pages
    pool = torch.randn(total, 2, PAGE, HEAD_DIM).to(dtype)
    table = torch.randperm(total).int().view(shape)
    entry_positions = torch.empty(total, PAGE, dtype=torch.int32)
    entry_positions[table.long()] = torch.arange(pages * PAGE, dtype=torch.int32).view(pages, PAGE)
    kept = torch.full(shape[:3], held, dtype=torch.int32)
    start = torch.arange(sequences + 1, dtype=torch.int32) * new
    positions = torch.arange(held, held + new).repeat(sequences)
    query = torch.randn(sequences * new, KV_HEADS * GROUP, HEAD_DIM).to(dtype)

    def own() -> torch.Tensor:
        step = PagedStep(pool, entry_positions, table, kept, start, positions)
        return step.attend(0, query, value_dim=HEAD_DIM, scale=0.1)

    def reference() -> torch.Tensor:
        tensors = (query, pool, entry_positions, table[:, 0], kept[:, 0], start, (new,) * sequences, positions)
        return paged_attention(*tensors, max_kept=held + new, value_dim=HEAD_DIM, scale=0.1)

    return own, reference, sequences * KV_HEADS * (held + new) * 2 * HEAD_DIM * dtype.itemsize


def attention_table(dtype: torch.dtype, seconds: float, bandwidth: float, context: int, batches: list[int]) -> Table:
    """Decode attention as a share of bandwidth, prompt chunks as a rate."""
    table = Table("attention", "held entries", "GB/s", "of memory bandwidth", "GFLOP/s", "torch / own")
    cases = [(f"decode, batch {batch}", batch, 1, context) for batch in batches]
    cases += [("prompt chunk of 512", 1, 512, held) for held in (0, context)]
    for name, sequences, new, held in cases:
        own, reference, size = attention_case(sequences, new, held, dtype)
        mine, other = fastest(own, seconds), fastest(reference, seconds)
        seen = new * held + new * (new + 1) / 2
        flops = 4 * sequences * KV_HEADS * GROUP * HEAD_DIM * seen / mine
        share = f"{size / mine / bandwidth:.0%}" if new == 1 else ""
        row = (f"{size / mine / 1e9:.1f}", share, f"{flops / 1e9:.0f}", f"{other / mine:.2f}x")
        table.add_row(name, str(held), *row)
    return table


@contextmanager
def timed_kernels() -> Iterator[defaultdict[str, float]]:
    """Seconds spent inside each C++ function while the context is open."""
    library, spent = loaded_library(), defaultdict[str, float](float)
    originals: dict[str, Any] = {name: getattr(library, name) for name in ("linear", "attention", "rms_norm", "rotate")}

    def timed(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            started = time.perf_counter()
            originals[name](*arguments)
            spent[name] += time.perf_counter() - started

        return call

    try:
        for name in originals:
            setattr(library, name, timed(name))
        yield spent
    finally:
        for name, function in originals.items():
            setattr(library, name, function)


def start_sequences(engine: Engine, batch: int, length: int) -> None:
    """Compute a prompt of `PROMPT` tokens in each of `batch` slots, with pages for `length` tokens."""
    heads = engine.spec.num_layers * engine.spec.num_kv_heads
    count = -(-length // engine.info.page_size) * heads
    local = np.arange(count, dtype=np.int32)
    for slot in map(SlotId, range(batch)):
        ids = tuple((7 * i + slot) % 8000 for i in range(PROMPT))
        grants = PageGrants(np.full(count, slot, np.int32), local % heads, local // heads, local + slot * count)
        params = SamplingParams(temperature=0.0)
        start = SlotAssignment(slot, params, 0, (), prompt_ids=ids, output_ids=(), max_length=length)
        engine.step(BatchPlan((SequencePlan(slot, 0, ids, sample=True),), (start,), grants=grants))


def step_seconds(engine: Engine, batch: int, steps: int) -> dict[str, float]:
    """The parts of the fastest of some decode steps."""
    start_sequences(engine, batch, PROMPT + steps)
    best: dict[str, float] = {}
    for number in range(steps):
        sequences = (SequencePlan(SlotId(s), PROMPT + number, ((31 * number + s) % 8000,), True) for s in range(batch))
        plan = BatchPlan(tuple(sequences))
        with timed_kernels() as spent:
            started = time.perf_counter()
            output = engine.step(plan)
            spent["whole step"] = time.perf_counter() - started
        spent["sampling"] = output.sample_seconds
        if not best or spent["whole step"] < best["whole step"]:
            best = spent
    return best


def step_table(dtype: Literal["float32", "bfloat16"], batches: list[int], bandwidth: float) -> Table:
    """Decode steps of quire-mini and where their time goes."""
    table = Table("decode step of quire-mini", *(f"batch {batch}" for batch in batches))
    engine = Engine.load(
        EngineConfig(model=str(embedded_model()), dtype=dtype, max_num_seqs=max(batches)), lambda *_: None
    )
    weights = sum(path.stat().st_size for path in embedded_model().glob("*.safetensors"))
    weights *= 2 if dtype == "float32" else 1
    steps = [step_seconds(engine, batch, 100) for batch in batches]
    for part in ("linear", "attention", "rms_norm", "rotate", "sampling"):
        table.add_row(part, *(f"{s[part] * 1e3:.2f} ms  {s[part] / s['whole step']:.0%}" for s in steps))
    rest = [s["whole step"] * 2 - sum(s.values()) for s in steps]
    table.add_row("Python", *(f"{r * 1e3:.2f} ms  {r / s['whole step']:.0%}" for r, s in zip(rest, steps, strict=True)))
    table.add_row("whole step", *(f"{s['whole step'] * 1e3:.2f} ms" for s in steps), end_section=True)
    floor = weights / bandwidth
    table.add_row("x reading the weights once", *(f"{s['whole step'] / floor:.1f}x" for s in steps))
    return table


@torch.inference_mode()
def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    console = Console(width=120)
    bandwidth = read_bandwidth(args.seconds)
    threads = torch.get_num_threads()
    console.print(f"{args.dtype}, {threads} threads, memory is read at {bandwidth / 1e9:.1f} GB/s")
    console.print(linear_table(dtype, args.seconds, bandwidth))
    console.print(attention_table(dtype, args.seconds, bandwidth, args.context, args.batches))
    console.print(step_table(args.dtype, args.batches, bandwidth))


if __name__ == "__main__":
    main()
