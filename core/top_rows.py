"""What the model says after a token, compactly: its most likely next tokens, and the mass of all others.

A row is little-endian: K token ids (uint32), best first, their natural log-probabilities and, last, that of all other
tokens together (float16): 6 K + 2 bytes. It is of the model's own distribution: temperature 1, before penalties.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = 1
"""Of this format, where rows are kept."""
TOP_TOKENS = 20
"""K, where the vocabulary has so many."""
LEAST_MASS = 1e-7
"""Of all other tokens: what float32 can tell from nothing when the mass of the best is taken from 1."""


def pack_rows(ids: npt.NDArray[np.int64], logs: npt.NDArray[np.float32]) -> list[bytes]:
    """Rows of ids [N, K] with log-probabilities [N, K]."""
    rows = np.empty(len(ids), _row_type(ids.shape[1]))
    others = np.maximum(1.0 - np.exp(logs.astype(np.float64)).sum(1), LEAST_MASS)
    rows["ids"], rows["logs"][:, :-1], rows["logs"][:, -1] = ids, logs, np.log(others)
    data, size = rows.tobytes(), rows.itemsize
    return [data[first : first + size] for first in range(0, len(data), size)]


def unpack_rows(data: bytes, kept: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16]]:
    """Ids [N, K] and log-probabilities [N, K + 1], the others' last. Raises `ValueError` for what are no such rows."""
    rows = np.frombuffer(data, _row_type(kept))
    return rows["ids"], rows["logs"]


def row_bytes(kept: int) -> int:
    """Of a row of K tokens."""
    return _row_type(kept).itemsize


def kept_tokens(row: bytes) -> int:
    """K of a row."""
    return (len(row) - row_bytes(0)) // (row_bytes(1) - row_bytes(0))


def _row_type(kept: int) -> np.dtype[Any]:
    return np.dtype([("ids", "<u4", (kept,)), ("logs", "<f2", (kept + 1,))])
