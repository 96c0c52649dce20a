"""The CPU kernels beside the machine's memory bandwidth and plain torch; for whole steps see cpu_step.py.

    python benchmarks/cpu_kernels.py [--dtype bfloat16] [--seconds 0.2] [--context 2048] [--batches 1 8 32]
        [--head-dims 64 128] [--page-size 16]

Every number is the fastest of the runs that fit into `--seconds`: whatever else the machine does only adds time.
Contenders of one row run right after each other. `torch` is `F.linear`, which packs the weights anew on each call, and
the reference attention, which gathers the pages and calls `scaled_dot_product_attention`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from quire.kernels.attention import paged_attention
from quire.kernels.attention_cpu import PagedStep
from quire.kernels.cache import zeros
from quire.kernels.linear import linear

Contender = Callable[[], object]
KV_HEADS, GROUP = 8, 4
SHAPES = {"448 -> 2048 (quire-mini)": (448, 2048), "4096 -> 4096 (8B model)": (4096, 4096)}


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
    """Rates of the linear layer at one, few (as verify drafts) and many rows."""
    table = Table("linear", "rows", "GFLOP/s", "weights GB/s", "of memory bandwidth", "torch / own")
    for name, (inputs, outputs) in SHAPES.items():
        weight = torch.randn(outputs, inputs).to(dtype)
        for rows in (1, 5, 32, 512):
            x = torch.randn(rows, inputs).to(dtype)
            own = fastest(partial(linear, x, weight, backend="cpu"), seconds)
            other = fastest(partial(F.linear, x, weight), seconds)
            rate = weight.nbytes / own
            flops = 2 * rows * weight.numel() / own
            share = f"{rate / bandwidth:.0%}" if rows <= 5 else ""
            table.add_row(name, str(rows), f"{flops / 1e9:.0f}", f"{rate / 1e9:.1f}", share, f"{other / own:.2f}x")
    return table


@dataclass(frozen=True, slots=True)
class Cache:
    """How a pool is laid out."""

    dtype: torch.dtype
    head_dim: int
    page_size: int


def attention_case(sequences: int, new: int, held: int, cache: Cache) -> tuple[Contender, Contender, int]:
    """Own and reference attention over a pool in shuffled pages, and the bytes of keys and values that are read."""
    pages = -(-(held + new) // cache.page_size)
    shape = (sequences, 1, KV_HEADS, pages)
    total = sequences * KV_HEADS * pages
    pool = zeros((total, 2, cache.page_size, cache.head_dim), cache.dtype, torch.device("cpu")).normal_()
    table = torch.randperm(total).int().view(shape)
    entry_positions = torch.empty(total, cache.page_size, dtype=torch.int32)
    entry_positions[table.long()] = torch.arange(pages * cache.page_size, dtype=torch.int32).view(pages, -1)
    kept = torch.full(shape[:3], held, dtype=torch.int32)
    start = torch.arange(sequences + 1, dtype=torch.int32) * new
    positions = torch.arange(held, held + new).repeat(sequences)
    query = torch.randn(sequences * new, KV_HEADS * GROUP, cache.head_dim).to(cache.dtype)

    def own() -> torch.Tensor:
        step = PagedStep(pool, entry_positions, table, kept, start, positions)
        return step.attend(0, query, value_dim=cache.head_dim, scale=0.1)

    def reference() -> torch.Tensor:
        tensors = (query, pool, entry_positions, table[:, 0], kept[:, 0], start, (new,) * sequences, positions)
        return paged_attention(*tensors, max_kept=held + new, value_dim=cache.head_dim, scale=0.1)

    return own, reference, sequences * KV_HEADS * (held + new) * 2 * cache.head_dim * cache.dtype.itemsize


def attention_table(cache: Cache, seconds: float, bandwidth: float, context: int, batches: list[int]) -> Table:
    """Decoding and verification as a share of bandwidth, prompt chunks as a rate."""
    table = Table(
        f"attention, head dim {cache.head_dim}", "held entries", "GB/s", "of memory bandwidth", "GFLOP/s", "torch / own"
    )
    cases = [(f"decode, batch {batch}", batch, 1, context) for batch in batches]
    cases += [(f"verify 4 drafts, batch {batch}", batch, 5, context) for batch in batches]
    cases += [("prompt chunk of 512", 1, 512, held) for held in (0, context)]
    for name, sequences, new, held in cases:
        own, reference, size = attention_case(sequences, new, held, cache)
        mine, other = fastest(own, seconds), fastest(reference, seconds)
        seen = new * held + new * (new + 1) / 2
        flops = 4 * sequences * KV_HEADS * GROUP * cache.head_dim * seen / mine
        share = f"{size / mine / bandwidth:.0%}" if new <= 5 else ""
        row = (f"{size / mine / 1e9:.1f}", share, f"{flops / 1e9:.0f}", f"{other / mine:.2f}x")
        table.add_row(name, str(held), *row)
    return table


@torch.inference_mode()
def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--page-size", type=int, default=16)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    console = Console(width=120)
    bandwidth = read_bandwidth(args.seconds)
    threads = torch.get_num_threads()
    console.print(f"{args.dtype}, {threads} threads, memory is read at {bandwidth / 1e9:.1f} GB/s")
    console.print(linear_table(dtype, args.seconds, bandwidth))
    for head_dim in args.head_dims:
        cache = Cache(dtype, head_dim, args.page_size)
        console.print(attention_table(cache, args.seconds, bandwidth, args.context, args.batches))


if __name__ == "__main__":
    main()
