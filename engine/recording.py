"""What a step drew, on its way to the host, with what the model said in the rows of sequences that are recorded."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..core.plan import IntArray
from ..core.top_rows import TOP_TOKENS, pack_rows
from ..kernels.backend import Backend
from ..kernels.sampling import top_logprobs
from .staging import Download, upload


@dataclass(frozen=True, slots=True)
class Recording:
    """The most likely tokens of M of the rows that a step sampled from."""

    places: IntArray
    """[M], ascending: which of the sampled rows."""
    ids: Download
    """[M, K] int64."""
    logs: Download
    """[M, K] float32: natural log-probabilities."""

    def rows(self) -> dict[int, bytes]:
        """By place, see `core.top_rows`; waits for the device."""
        return dict(zip(self.places.tolist(), pack_rows(self.ids.wait(), self.logs.wait()), strict=True))


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew."""

    numbers: Download
    """[N + R] int64: tokens of the N sampled rows, then which of the R rows of logits are finite."""
    recording: Recording | None

    def wait(self) -> tuple[np.ndarray[Any, Any], dict[int, bytes]]:
        """The numbers, and rows by place among the N, once they are there."""
        return self.numbers.wait(), {} if self.recording is None else self.recording.rows()


def record(logits: Tensor, sampled: IntArray, wanted: np.ndarray[Any, Any], backend: Backend) -> Recording | None:
    """Of logits [R, V] float32, the rows sampled [N] where wanted [N]; None if none is.

    The host looks at them later, when the next step may have overwritten the logits.
    """
    places = np.flatnonzero(wanted).astype(np.int32)
    if not len(places):
        return None
    everything = len(places) == len(logits)  # then they are all of them, in order
    chosen = logits if everything else logits[upload(sampled[places], logits.device)]
    ids, logs = top_logprobs(chosen, TOP_TOKENS, backend)
    return Recording(places, Download(ids), Download(logs))
