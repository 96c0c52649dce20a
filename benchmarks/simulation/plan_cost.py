"""What the scheduler itself costs: wall time of plan and commit, and of looking up a long prompt."""

import gc
import statistics

from rich.table import Table

from benchmarks.prefix import PAGE, busy_scheduler, look_up, step_times

SIZES = (256, 1024, 4096)


def step_table(sizes: tuple[int, ...] = SIZES) -> Table:
    """Median and mean over the steps in which each of so many decoding sequences fills two pages."""
    table = Table("sequences decoding", "median ms", "mean ms", "median us per sequence", title="plan and commit")
    for size in sizes:
        scheduler = busy_scheduler(True, size)
        gc.collect()
        times = step_times(scheduler, 2 * PAGE)
        median, mean = statistics.median(times), statistics.mean(times)
        table.add_row(f"{size:,}", f"{median:.3f}", f"{mean:.3f}", f"{median / size * 1e3:.2f}")
    return table


def tables() -> list[Table]:
    """Both."""
    return [step_table(), look_up()]
