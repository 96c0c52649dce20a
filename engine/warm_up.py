"""The step with which an engine begins, before anybody asked for anything."""

import numpy as np

from ..core.ids import SlotId
from ..core.messages import EngineInfo
from ..core.plan import BatchPlan, PageGrants, SequencePlan, SlotAssignment
from ..core.request import SamplingParams

_TOKENS = 8


def first_chunk(info: EngineInfo, num_pages: int) -> tuple[BatchPlan, int]:
    """A short prompt in slot 0, with room for one token more, and how many pages it uses, from the first one on."""
    heads = info.model.num_layers * info.model.num_kv_heads
    fits = info.page_size * (num_pages // heads)
    count = min(_TOKENS, min(info.max_model_len, fits) - 1)
    ids = tuple(i % info.model.vocab_size for i in range(count))
    pages = -(-(count + 1) // info.page_size) * heads
    assignment = SlotAssignment(
        SlotId(0), SamplingParams(), 0, (), prompt_ids=ids, output_ids=(), max_length=info.max_model_len
    )
    page_ids = np.arange(pages, dtype=np.int32)
    grants = PageGrants(np.zeros(pages, np.int32), page_ids % heads, page_ids // heads, page_ids)
    return BatchPlan((SequencePlan(SlotId(0), 0, ids, sample=True),), (assignment,), grants=grants), pages
