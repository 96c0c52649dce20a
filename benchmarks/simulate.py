"""The real scheduler in virtual time: traffic like that of published traces on a cost model of a device.

    python benchmarks/simulate.py --device h200 --load 2 --requests 20000 --tenants 4 --flood 8
    python benchmarks/simulate.py --set prefix_cache=false --rate 5 --json out.json --plot out.png
    python benchmarks/simulate.py --plan-cost

Nothing here needs a model or a device. See benchmarks/README.md.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import typing
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("quire") is None:
    sys.path.insert(0, str(ROOT / "typings"))  # holds a link to each package under the name quire

from benchmarks.simulation.device import DEVICES, Device  # noqa: E402
from benchmarks.simulation.driver import Limits, Simulation  # noqa: E402
from benchmarks.simulation.plan_cost import tables  # noqa: E402
from benchmarks.simulation.report import latency_table, load_table, plot, tenant_table  # noqa: E402
from benchmarks.simulation.results import Objective, Result  # noqa: E402
from benchmarks.simulation.traffic import WORKLOADS, Traffic  # noqa: E402
from quire.scheduler.config import SchedulerConfig  # noqa: E402

_PEAK_REQUESTS = 6
"""Times the sequences that run at once: so many requests, all there at the start, show the peak."""
_PEAK_DIVISORS = (1, 2, 4, 8)


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """`field=value` pairs for `SchedulerConfig`; SystemExit names what is wrong."""
    types, changes = typing.get_type_hints(SchedulerConfig), {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in SchedulerConfig.__dataclass_fields__:
            raise SystemExit(f"--set {pair}: the scheduler has no setting {name!r}")
        try:
            changes[name] = msgspec.convert(value, types[name], strict=False)
        except msgspec.ValidationError as error:
            raise SystemExit(f"--set {pair}: {error}") from error
    return changes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--device", choices=DEVICES, default="h200", help="model and device")
    known.add_argument("--workload", choices=WORKLOADS, default="conversation", help="lengths of prompts and outputs")
    known.add_argument("--requests", type=int, default=5000)
    known.add_argument(
        "--load", type=float, default=0.7, help="requests per second by those of the peak; 2 is overload"
    )
    known.add_argument("--rate", type=float, help="requests per second, instead of --load")
    known.add_argument("--burst", type=float, default=1.0, help="variation of the times between arrivals; 1: Poisson")
    known.add_argument("--tenants", type=int, default=1)
    known.add_argument("--flood", type=float, default=1.0, help="the first tenant asks for so many times as much")
    known.add_argument("--shared", type=int, default=0, help="tokens of each tenant's system prompt")
    known.add_argument("--fairness", action="store_true", help="compare each tenant with its fair share of the device")
    known.add_argument("--max-num-seqs", type=int, default=256)
    known.add_argument("--max-batch-tokens", type=int, default=2048)
    known.add_argument("--max-waiting", type=int, default=20_000, help="a full queue sends clients away for a while")
    known.add_argument("--kv-tokens", type=int, help="tokens that the KV pool holds, instead of what the device has")
    known.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of SchedulerConfig")
    known.add_argument("--slo-ttft", type=float, default=2.0, help="seconds")
    known.add_argument("--slo-tpot", type=float, default=0.1, help="seconds per output token")
    known.add_argument("--seed", type=int, default=0)
    known.add_argument("--json", type=Path)
    known.add_argument("--plot", type=Path, help="PNG; needs the extra `plot`")
    known.add_argument("--plan-cost", action="store_true", help="only measure the scheduler's own time")
    return known


def simulate(device: Device, traffic: Traffic, limits: Limits, goal: Objective, console: Console, name: str) -> Result:
    """One run with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    simulation = Simulation(device, traffic, limits)
    simulation.result.objective = goal
    tenants = range(traffic.tenants) if traffic.only is None else (traffic.only,)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=sum(traffic.quota(tenant) for tenant in tenants))
        return simulation.run(lambda done: bar.update(task, completed=done))


def find_peak(device: Device, traffic: Traffic, limits: Limits, console: Console) -> float:
    """Output tokens per second when there is always enough to do, at the concurrency that suits the pool best."""
    rates = []
    for divisor in _PEAK_DIVISORS:
        sequences = max(limits.max_num_seqs // divisor, 1)
        crowd = dataclasses.replace(traffic, requests=_PEAK_REQUESTS * sequences, rate=math.inf)
        fewer = dataclasses.replace(limits, max_num_seqs=sequences)
        rates.append(simulate(device, crowd, fewer, Objective(0, 0), console, "peak").saturated_rate)
    return max(rates)


def measure(args: argparse.Namespace, console: Console) -> tuple[Result, dict[str, Any]]:
    """The peak, the run, and, if asked for, each tenant on its share of the device."""
    device = DEVICES[args.device]
    if args.kv_tokens is not None:
        device = dataclasses.replace(device, kv_memory=args.kv_tokens * device.model.kv_bytes)
    limits = Limits(args.max_num_seqs, args.max_batch_tokens, args.max_waiting, parse_changes(args.set))
    goal = Objective(args.slo_ttft, args.slo_tpot)
    traffic = Traffic(
        WORKLOADS[args.workload], args.requests, math.inf, args.burst, args.tenants, args.flood, args.shared,
        device.model.max_model_len, device.model.vocab_size, args.seed,
    )  # fmt: skip
    peak = find_peak(device, traffic, limits, console)
    rate = args.rate or args.load * peak / traffic.lengths.mean_output
    traffic = dataclasses.replace(traffic, rate=rate)
    result = simulate(device, traffic, limits, goal, console, "run")
    summary = result.summary() | {"offered_requests_per_second": rate, "peak_output_tokens_per_second": peak}
    if args.fairness:
        share = dataclasses.replace(device, slowness=device.slowness * args.tenants)
        for number, tenant in enumerate(summary["tenants"]):
            alone = dataclasses.replace(traffic, only=number)
            mine = simulate(share, alone, limits, goal, console, f"tenant {number}").tenants[number]
            tenant["by_fair_share"] = tenant["mean_seconds"] / (mine.seconds / mine.requests)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return result, {"settings": settings, **summary}


def main() -> None:
    """Run what the command line asks for."""
    args, console = parser().parse_args(), Console()
    if args.plan_cost:
        for table in tables():
            console.print(table)
        return
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: install quire[plot]")
    result, summary = measure(args, console)
    for table in (latency_table(summary), load_table(summary), tenant_table(summary)):
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1))
    if args.plot:
        plot(result, summary, args.plot)


if __name__ == "__main__":
    main()
