"""From answers to figures, under the names that `vllm bench serve` gives them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .answers import Answer, Failure

PERCENTILES = (50, 95, 99)
LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}


@dataclass(frozen=True, slots=True)
class Spent:
    """What a load took."""

    seconds: float
    """From its beginning to its last answer."""
    client_cores: float
    """Of which the load generator kept so many busy."""
    server_cores: float | None = None
    """And the server's processes, where they are known."""


def summary(answers: Sequence[Answer | Failure], spent: Spent, limits: Mapping[str, float]) -> dict[str, float]:
    """All figures; times in milliseconds. Those of latencies are left out where nobody was answered.

    limits: of latencies, in milliseconds; an answer that keeps all of them is good.
    """
    whole = [answer for answer in answers if isinstance(answer, Answer)]
    inputs = sum(answer.prompt_tokens for answer in whole)
    outputs = sum(answer.output_tokens for answer in whole)
    figures: dict[str, float] = {
        "completed": len(whole),
        "failed": len(answers) - len(whole),
        "duration": spent.seconds,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(whole) / spent.seconds,
        "output_throughput": outputs / spent.seconds,
        "total_token_throughput": (inputs + outputs) / spent.seconds,
    }
    if limits:
        figures["request_goodput"] = sum(is_good(answer, limits) for answer in whole) / spent.seconds
    figures["client_cores"] = spent.client_cores
    if spent.server_cores is not None:
        figures["server_cores"] = spent.server_cores
    for name in LATENCIES:
        values = [value for answer in whole for value in latencies(answer, name)]
        if values:
            figures |= _distribution(name, np.array(values) * 1000)
    return figures


def latencies(answer: Answer, name: str) -> list[float]:
    """Of `LATENCIES`, in seconds: one of an answer, or as many as it has gaps between texts."""
    if name == "itl":
        return answer.itl
    value = getattr(answer, name)
    return [] if value is None else [value]


def is_good(answer: Answer, limits: Mapping[str, float]) -> bool:
    """Whether every latency is within its limit; of inter-token latencies, every single one."""
    return all(max(latencies(answer, name), default=0.0) * 1000 <= limit for name, limit in limits.items())


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """`ttft:200` -> milliseconds by name. Raises `ValueError` naming what is wrong."""
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name not in LATENCIES:
            raise ValueError(f"{text!r}: a limit is NAME:MILLISECONDS with a name of {', '.join(LATENCIES)}")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ValueError(f"{text!r}: {value!r} is no number of milliseconds") from None
    return limits


def _distribution(name: str, milliseconds: np.ndarray) -> dict[str, float]:
    named = {f"p{percent}_{name}_ms": percent for percent in PERCENTILES if percent != 50}
    return {
        f"mean_{name}_ms": float(milliseconds.mean()),
        f"median_{name}_ms": float(np.median(milliseconds)),
        f"std_{name}_ms": float(milliseconds.std()),
        **{key: float(np.percentile(milliseconds, percent)) for key, percent in named.items()},
    }
