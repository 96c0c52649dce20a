"""What it costs to choose which entries stay: each policy, budget and refinement against the linear part of a layer.

    python benchmarks/pruning_scores.py --entries 4096

One layer of a 1B-class model on random data: ratios within one run, so that they can be compared between machines.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quire.core.pruning import Budget, PruneParams
from quire.pruning.policy import LayerView
from quire.pruning.select import select
from quire.pruning.table import POLICIES, make_policy

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, DIM, WINDOW = 2048, 8192, 32, 8, 64, 64


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


def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Plain rotary angles."""
    frequencies = 10000 ** -(torch.arange(DIM // 2, device=positions.device) / (DIM // 2))
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def random_view(entries: int, dtype: torch.dtype, device: torch.device) -> LayerView:
    """A layer with everything that a policy may ask for."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    factors = torch.randn(HEADS, DIM, DIM, device=device)
    return LayerView(
        layer=0,
        keys=noise(KV_HEADS, entries, DIM),
        values=noise(KV_HEADS, entries, DIM),
        positions=torch.arange(entries, dtype=torch.int32, device=device).repeat(KV_HEADS, 1),
        lengths=torch.full((KV_HEADS,), entries, device=device),
        valid=torch.ones(KV_HEADS, entries, dtype=torch.bool, device=device),
        num_tokens=entries,
        scale=DIM**-0.5,
        queries=noise(WINDOW, HEADS, DIM),
        query_positions=torch.arange(entries - WINDOW, entries, device=device),
        mass=torch.rand(KV_HEADS, entries, device=device),
        seen=torch.arange(entries, 0, -1, device=device).float().repeat(KV_HEADS, 1),
        repeated=torch.rand(KV_HEADS, entries, device=device),
        query_mean=torch.randn(HEADS, DIM, device=device),
        query_covariance=factors @ factors.mT / DIM,
        rotation=rotation,
        output_weight=noise(HIDDEN, HEADS * DIM),
    )


def linear_seconds(entries: int, dtype: torch.dtype, device: torch.device) -> float:
    """The layer's matrix products over all its tokens."""
    states = torch.randn(entries, HIDDEN, dtype=dtype, device=device)
    weight = torch.randn(HIDDEN, HIDDEN, dtype=dtype, device=device)
    products = (2 * HIDDEN + 2 * KV_HEADS * DIM + 3 * FEED_FORWARD) / HIDDEN
    return best_seconds(lambda: states @ weight.T) * products


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--entries", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, help="of the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    view, linear = random_view(options.entries, dtype, device), linear_seconds(options.entries, dtype, device)
    budgets: tuple[Budget, ...] = ("pyramid", "prefix", "ada")
    cases = {name: PruneParams(policy=name) for name in POLICIES}
    cases |= {f"h2o, {budget}": PruneParams(policy="h2o", budget=budget) for budget in budgets}
    cases |= {
        "h2o, value-norm": PruneParams(policy="h2o", refine=("value-norm",)),
        "h2o, chunk": PruneParams(policy="h2o", refine=("chunk",)),
    }
    print(f"{options.entries} entries, {options.dtype}, {device}: linear part of a layer {1e3 * linear:.1f} ms")
    layers = [view, view]
    for name, params in cases.items():
        seconds = best_seconds(partial(select, make_policy(params), layers, params, options.entries // 2)) / len(layers)
        print(f"{name:16} {1e3 * seconds:8.2f} ms a layer {100 * seconds / linear:7.2f} %")


if __name__ == "__main__":
    main()
