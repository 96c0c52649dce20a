"""What a run gave: latencies, throughput, goodput, fairness."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.core.messages import EngineStats

from .device import Device

_LOWEST, _HIGHEST, _PER_DECADE = 1e-5, 1e6, 200
PERCENTILES = (50, 90, 99)


class Histogram:
    """Counts of seconds in logarithmic bins: any number of values in 18 kB, percentiles within 1.2 %."""

    def __init__(self) -> None:
        bins = round(math.log10(_HIGHEST / _LOWEST) * _PER_DECADE)
        self.counts = np.zeros(bins, np.int64)

    def add(self, seconds: npt.NDArray[np.float64]) -> None:
        """Count these values."""
        bins = np.log10(np.maximum(seconds, _LOWEST) / _LOWEST) * _PER_DECADE
        self.counts += np.bincount(np.minimum(bins.astype(np.int64), len(self.counts) - 1), minlength=len(self.counts))

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Upper end of each bin, in seconds."""
        return _LOWEST * 10 ** ((np.arange(len(self.counts)) + 1) / _PER_DECADE)

    def percentile(self, percent: float) -> float:
        """Upper end of the bin where it lies; NaN without values."""
        total = self.counts.sum()
        if not total:
            return math.nan
        return float(self.edges[np.searchsorted(self.counts.cumsum(), total * percent / 100)])


@dataclass(slots=True)
class TenantResult:
    """Sums over a tenant's requests."""

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """End to end."""
    slowdowns: float = 0.0
    """Each request's time end to end by what it takes alone on the idle device."""
    worst: float = 0.0


@dataclass(frozen=True, slots=True)
class Objective:
    """A request meets it with both: time to first token, and mean time per output token after it; seconds."""

    ttft: float
    tpot: float


class Result:
    """Filled while a run goes on; its memory does not grow with the run."""

    def __init__(self, device: str, tenants: int, model: Device) -> None:
        self.device = device
        self.tenants = [TenantResult() for _ in range(tenants)]
        self.ttft, self.itl, self.e2e = Histogram(), Histogram(), Histogram()
        self.objective = Objective(ttft=2.0, tpot=0.1)
        self.good = self.tokens = self.refusals = self.prompt_tokens = 0
        self.failures: Counter[str] = Counter()
        self.seconds = 0.0
        self.stats = EngineStats()
        self._model = model
        self.warm_up = 0
        """Requests that end before the rate under saturation is counted: the first batch is all prompts."""
        self._saturated_seconds = 0.0
        self._saturated_tokens = 0

    @property
    def finished(self) -> int:
        """Requests that ended with their whole output."""
        return sum(tenant.requests for tenant in self.tenants)

    @property
    def saturated_rate(self) -> float:
        """Output tokens per second of the steps in which requests waited; of the whole run if there were none."""
        if self._saturated_seconds:
            return self._saturated_tokens / self._saturated_seconds
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def saturated_share(self) -> float:
        """Of the run's time: steps in which requests waited."""
        return self._saturated_seconds / self.seconds if self.seconds else 0.0

    def step(self, seconds: float, tokens: int, waiting: int) -> None:
        """One step gave so many tokens."""
        if waiting and self.finished >= self.warm_up:
            self._saturated_seconds += seconds
            self._saturated_tokens += tokens

    def end(self, tenant: int, *, prompt: int, output: int, ttft: float, e2e: float) -> None:
        """A request is complete."""
        self.ttft.add(np.array([ttft]))
        self.e2e.add(np.array([e2e]))
        self.prompt_tokens += prompt
        tpot = (e2e - ttft) / max(output - 1, 1)
        self.good += ttft <= self.objective.ttft and tpot <= self.objective.tpot
        mine, slowdown = self.tenants[tenant], e2e / self._model.request_seconds(prompt, output)
        mine.requests += 1
        mine.tokens += output
        mine.seconds += e2e
        mine.slowdowns += slowdown
        mine.worst = max(mine.worst, slowdown)

    def close(self, seconds: float, stats: EngineStats) -> None:
        """The run is over after so many seconds."""
        self.seconds, self.stats = seconds, stats

    def summary(self) -> dict[str, Any]:
        """All numbers, for people and JSON; times in seconds."""
        latency = {
            name: {f"p{percent}": histogram.percentile(percent) for percent in PERCENTILES}
            for name, histogram in (("ttft", self.ttft), ("itl", self.itl), ("e2e", self.e2e))
        }
        queries = self.stats.prefix_queries_total
        return {
            "device": self.device,
            "requests": self.finished,
            "failed": dict(self.failures),
            "refused_and_retried": self.refusals,
            "seconds": self.seconds,
            "latency": latency,
            "output_tokens": self.tokens,
            "output_tokens_per_second": self.tokens / self.seconds,
            "saturated_output_tokens_per_second": self.saturated_rate,
            "saturated_share": self.saturated_share,
            "requests_per_second": self.finished / self.seconds,
            "goodput_requests_per_second": self.good / self.seconds,
            "objective": {"ttft": self.objective.ttft, "tpot": self.objective.tpot},
            "prefix_hit_rate": self.stats.prefix_hits_total / queries if queries else 0.0,
            "preemptions": self.stats.preemptions_total,
            "steps": self.stats.steps_total,
            "tenants": [
                {
                    "requests": tenant.requests,
                    "output_tokens": tenant.tokens,
                    "mean_seconds": tenant.seconds / max(tenant.requests, 1),
                    "mean_slowdown": tenant.slowdowns / max(tenant.requests, 1),
                    "max_slowdown": tenant.worst,
                }
                for tenant in self.tenants
            ],
        }
