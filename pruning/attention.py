"""What the newest queries look at: one pass of a few rows over the keys, for policies that score by it."""

from torch import Tensor

from ..kernels.attention_columns import attention_columns
from .policy import LayerView


def mean_attention(view: LayerView, rows: int) -> Tensor:
    """Probability that the newest `rows` observed queries give each entry, mean over them and over a group's heads.

    Returns [K, E] float32, 0 past a head's length. Rows see no entry newer than themselves.
    Raises `ValueError` where the view has no queries.
    """
    if view.queries is None or view.query_positions is None:
        raise ValueError("the view has no queries: the policy must name them in its needs")
    queries, positions = view.queries[-rows:], view.query_positions[-rows:]
    received = attention_columns(
        queries,
        view.stored_keys,
        view.stored_positions,
        view.lengths,
        positions,
        reduce="sum",
        scale=view.scale,
        softcap=view.softcap,
        sinks=view.sink_logits,
        backend=view.backend,
    )
    return received.div_(len(queries) * queries.shape[1] // len(view.lengths))
