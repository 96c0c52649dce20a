"""What it costs to choose which entries stay: each policy, budget and refinement against the linear part of a layer.

    python -m benchmarks.pruning_scores --entries 4096 --shape 0.5b

One layer of the shape on random data: ratios within one run, so that they can be compared between machines.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quire.core.pruning import Budget, PruneParams
from quire.kernels.backend import resolve_backend
from quire.kernels.linear import linear
from quire.kernels.paged_rows import PagedRows
from quire.pruning.policy import LayerView
from quire.pruning.select import select
from quire.pruning.table import POLICIES, make_policy

WINDOW = 64
PAGE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's layer."""

    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    dim: int


SHAPES = {"0.5b": Shape(896, 4864, 14, 2, 64), "1b": Shape(2048, 8192, 32, 8, 64)}
"""Of Qwen2.5-0.5B and Llama-3.2-1B."""


def best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The least time of a call, after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def rotation(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Plain rotary angles."""
    frequencies = 10000 ** -(torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def random_view(shape: Shape, entries: int, dtype: torch.dtype, device: torch.device) -> LayerView:
    """A layer with everything that a policy may ask for."""

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=device)

    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.dim
    factors = torch.randn(heads, dim, dim, device=device)
    columns = -(-entries // PAGE)
    pool = noise(kv_heads * columns, 2, PAGE, dim)
    pages = torch.randperm(kv_heads * columns, device=device).view(kv_heads, columns).int()
    return LayerView(
        layer=0,
        stored_keys=PagedRows(pool[:, 0], pages, entries),
        stored_values=PagedRows(pool[:, 1], pages, entries),
        stored_positions=PagedRows.of(torch.arange(entries, dtype=torch.int32, device=device).repeat(kv_heads, 1)),
        lengths=torch.full((kv_heads,), entries, device=device),
        num_tokens=entries,
        scale=dim**-0.5,
        queries=noise(WINDOW, heads, dim),
        query_positions=torch.arange(entries - WINDOW, entries, device=device),
        mass=torch.rand(kv_heads, entries, device=device),
        seen=torch.arange(entries, 0, -1, device=device).float().repeat(kv_heads, 1),
        repeated=torch.rand(kv_heads, entries, device=device),
        query_mean=torch.randn(heads, dim, device=device),
        query_covariance=factors @ factors.mT / dim,
        rotation=partial(rotation, dim),
        backend=resolve_backend(device, dtype),
        output_weight=noise(shape.hidden, heads * dim),
    )


def linear_seconds(shape: Shape, entries: int, dtype: torch.dtype, device: torch.device) -> float:
    """The layer's matrix products over all its tokens."""
    hidden, queries = shape.hidden, shape.heads * shape.dim
    states = torch.randn(entries, hidden, dtype=dtype, device=device)
    weight = torch.randn(hidden, hidden, dtype=dtype, device=device)
    products = (2 * queries + 2 * shape.kv_heads * shape.dim + 3 * shape.feed_forward) / hidden
    backend = resolve_backend(device, dtype)
    return best_seconds(lambda: linear(states, weight, backend=backend)) * products


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--entries", type=int, default=4096)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, help="of the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    shape = SHAPES[options.shape]
    view = random_view(shape, options.entries, dtype, device)
    layer_seconds = linear_seconds(shape, options.entries, dtype, device)
    budgets: tuple[Budget, ...] = ("pyramid", "prefix", "ada", "global")
    cases = {name: PruneParams(policy=name) for name in POLICIES}
    cases |= {f"h2o, {budget}": PruneParams(policy="h2o", budget=budget) for budget in budgets}
    cases |= {
        "h2o, value-norm": PruneParams(policy="h2o", refine=("value-norm",)),
        "h2o, chunk": PruneParams(policy="h2o", refine=("chunk",)),
    }
    print(f"{options.entries} entries, {options.dtype}, {device}: linear part of a layer {1e3 * layer_seconds:.1f} ms")
    layers = [view, view]
    for name, params in cases.items():
        seconds = best_seconds(partial(select, make_policy(params), layers, params, options.entries // 2)) / len(layers)
        print(f"{name:16} {1e3 * seconds:8.2f} ms a layer {100 * seconds / layer_seconds:7.2f} %")


if __name__ == "__main__":
    main()
