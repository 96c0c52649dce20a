"""Tables and plots of a run's summary."""

from pathlib import Path
from typing import Any

from rich.table import Table

from .results import PERCENTILES, Result


def latency_table(summary: dict[str, Any]) -> Table:
    """Percentiles of the latencies."""
    table = Table("milliseconds", *(f"p{percent}" for percent in PERCENTILES), title=summary["device"])
    names = {"ttft": "time to first token", "itl": "between tokens", "e2e": "end to end"}
    for key, name in names.items():
        table.add_row(name, *(f"{seconds * 1e3:,.1f}" for seconds in summary["latency"][key].values()))
    return table


def load_table(summary: dict[str, Any]) -> Table:
    """Throughput and what it cost."""
    table = Table("", "value", title="load")
    failed = sum(summary["failed"].values())
    goal = summary["objective"]
    rows = {
        "requests (failed)": f"{summary['requests']:,} ({failed})",
        "refused by a full queue, came again": f"{summary['refused_and_retried']:,}",
        "virtual seconds": f"{summary['seconds']:,.1f}",
        "requests/s": f"{summary['requests_per_second']:,.2f}",
        f"goodput, requests/s (TTFT {goal['ttft']:g} s, TPOT {goal['tpot']:g} s)": (
            f"{summary['goodput_requests_per_second']:,.2f}"
        ),
        "output tokens/s": f"{summary['output_tokens_per_second']:,.0f}",
        "output tokens/s while requests waited": f"{summary['saturated_output_tokens_per_second']:,.0f}",
        "prefix hit rate": f"{summary['prefix_hit_rate']:.1%}",
        "preemptions": f"{summary['preemptions']:,}",
    }
    if "peak_output_tokens_per_second" in summary:
        ratio = summary["saturated_output_tokens_per_second"] / summary["peak_output_tokens_per_second"]
        rows["peak tokens/s, best concurrency"] = f"{summary['peak_output_tokens_per_second']:,.0f}"
        if summary["saturated_share"] > 0.5:  # else there was too little to do
            rows["of the peak, while requests waited"] = f"{ratio:.1%}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def tenant_table(summary: dict[str, Any]) -> Table:
    """Who had to wait how long."""
    tenants = summary["tenants"]
    fair = "by_fair_share" in tenants[0]
    columns = ["tenant", "requests", "mean slowdown", "max slowdown", *(["by fair share"] if fair else [])]
    table = Table(*columns, title="slowdown: end to end by the time alone on the idle device")
    for number, tenant in enumerate(tenants):
        cells = [
            str(number),
            f"{tenant['requests']:,}",
            f"{tenant['mean_slowdown']:.2f}",
            f"{tenant['max_slowdown']:.1f}",
        ]
        table.add_row(*cells, *([f"{tenant['by_fair_share']:.2f}"] if fair else []))
    return table


def plot(result: Result, summary: dict[str, Any], path: Path) -> None:
    """Distributions of the latencies and the tenants' slowdowns, as PNG; needs matplotlib (the extra `plot`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    times, tenants = figure.subplots(1, 2, width_ratios=(2, 1))
    for name, histogram in (("TTFT", result.ttft), ("between tokens", result.itl), ("end to end", result.e2e)):
        counts = histogram.counts.cumsum()
        if counts[-1]:
            seen = slice(max(int((counts == 0).sum()) - 1, 0), int((counts < counts[-1]).sum()) + 1)
            times.plot(histogram.edges[seen], counts[seen] / counts[-1], label=name)
    times.set(xscale="log", xlabel="seconds", ylabel="share of values", title=result.device)
    times.grid(alpha=0.3)
    times.legend()
    slowdowns = [tenant["mean_slowdown"] for tenant in summary["tenants"]]
    tenants.bar([str(number) for number in range(len(slowdowns))], slowdowns)
    tenants.set(xlabel="tenant", title="mean slowdown")
    figure.savefig(path, dpi=80)
