"""The plot of a distillation report; needs matplotlib, which is an extra."""

from pathlib import Path

from matplotlib.figure import Figure

from .held_out import ALL, Measured


def draw(path: Path, before: Measured, after: Measured) -> Path:
    """Greedy acceptance by position in the proposal, and sampled acceptance, each by domain; returns `path`."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(1, after.most + 1)
    for index, domain in enumerate(after.by_position):
        colour, width = f"C{index}", 2.5 if domain == ALL else 1.2
        left.plot(places, after.by_position[domain], color=colour, linewidth=width, marker="o", label=domain)
        left.plot(places, before.by_position[domain], color=colour, linewidth=0.8, linestyle=":")
    left.set(xlabel="draft token", ylabel="accepted, given those before", ylim=(0, 1), xticks=list(places))
    left.set_title("greedy (dotted: before)")
    left.legend(fontsize=8)
    domains = list(after.acceptance)
    right.barh(domains, [after.acceptance[d] for d in domains], color="C0", label="after")
    right.barh(domains, [before.acceptance[d] for d in domains], height=0.35, color="C1", label="before")
    right.set(xlabel="probability that a sampled draft token is accepted", xlim=(0, 1))
    right.invert_yaxis()
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path
