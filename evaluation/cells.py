"""What was measured: one cell per measure, length and setting."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..core.messages import EngineInfo
from ..core.pruning import PruneCounts, PruneParams
from .statistics import bootstrap, interval
from .tasks import LOSSES, TASKS
from .trial import Completion, Trial

MEASURABLE = 0.5
"""Where the unpruned model scores below this, a task says nothing about pruning."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How the cache is pruned; the policy is "none" where it is not."""

    policy: str = "none"
    keep: float = 1.0
    params: PruneParams | None = None

    def __str__(self) -> str:
        return f"{self.policy} {self.keep:g}" if self.params else "unpruned"


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the trials of one task and length gave under one setting, and what they took, summed over the trials."""

    setting: Setting
    completions: list[Completion]
    seconds: float
    tokens: int
    """Computed: prompts, and outputs but for their last tokens."""
    counts: PruneCounts


@dataclass(frozen=True, slots=True)
class Cell:
    """One measure of one task at one length under one setting."""

    measure: str
    length: int
    """Of the prompts in tokens, at most; contexts before a scored tail are cut to whole chunks."""
    policy: str
    keep: float
    score: float
    """Mean of `scores`: a share, or nats per token."""
    low: float
    """The interval holds the true mean with 95 % confidence."""
    high: float
    change: float
    """Mean over the trials of score - score of the unpruned model."""
    change_low: float
    """Its 95 % interval: paired, so much narrower than that of the score."""
    change_high: float
    scores: list[float]
    """Of each trial."""
    measurable: bool
    """Whether the unpruned model can do the task at all."""
    kept_share: float
    """Of the entries of all heads, those still there at the end."""
    freed_bytes: float
    """KV memory that went back to the pool, mean per trial."""
    tokens_per_second: float
    speed: float
    """Tokens per second over those of the unpruned trials."""
    prune_share: float
    """Of the time, what choosing took."""

    @property
    def loss(self) -> bool:
        """Whether the score is a loss and not a share."""
        return self.measure in LOSSES


def cells(
    info: EngineInfo, task: str, length: int, trials: Sequence[Trial], outputs: Outputs, unpruned: Outputs
) -> list[Cell]:
    """Score the outputs of all trials."""
    counts, heads = outputs.counts, info.model.num_layers * info.model.num_kv_heads
    rate = outputs.tokens / outputs.seconds
    made = []
    for measure, scorer in TASKS[task].measures.items():
        pairs = list(zip(trials, outputs.completions, unpruned.completions, strict=True))
        scores = [scorer(trial, got, reference) for trial, got, reference in pairs]
        base = [scorer(trial, reference, reference) for trial, _, reference in pairs]
        changes = [score - other for score, other in zip(scores, base, strict=True)]
        low, high = interval(scores)
        change_low, change_high = bootstrap(changes)
        made.append(
            Cell(
                measure=measure,
                length=length,
                policy=outputs.setting.policy,
                keep=outputs.setting.keep,
                score=fmean(scores),
                low=low,
                high=high,
                change=fmean(changes),
                change_low=change_low,
                change_high=change_high,
                scores=scores,
                measurable=measure in LOSSES or fmean(base) >= MEASURABLE,
                kept_share=1 - counts.entries / (outputs.tokens * heads),
                freed_bytes=counts.pages * info.kv_bytes / info.num_pages / len(trials),
                tokens_per_second=rate,
                speed=rate / (unpruned.tokens / unpruned.seconds),
                prune_share=counts.seconds / outputs.seconds,
            )
        )
    return made
