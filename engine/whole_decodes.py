"""Steps of nothing but decodes and short drafts on a CPU, as one call of a kernel over the engine's own tables."""

from itertools import chain

import numpy as np

from ..core.plan import MAX_FORCED_TOKENS, BatchPlan, SequencePlan
from ..kernels.decode_step_cpu import DecodeRows, DecodeStepCPU, SlotTables
from ..models.native import NativeRunner
from ..models.runner import ModelRunner
from .cache import KVCache
from .sampler import Sampler
from .slots import SlotTable


def decode_step(runner: ModelRunner, cache: KVCache, table: SlotTable) -> DecodeStepCPU | None:
    """What computes them; None where no kernel does it in one piece."""
    if cache.device.type != "cpu" or not isinstance(runner, NativeRunner):
        return None
    tables = SlotTables(
        pool=cache.pool,
        entry_positions=cache.entry_positions,
        page_table=cache.page_table,
        kept=cache.kept,
        computed=cache.computed,
        closes_up=cache.closes_up,
        unaltered=table.unaltered,
        min_ends=table.min_ends,
        strengths=table.strengths,
        keys=table.keys,
        newest=table.newest,
    )
    return runner.decode_step(tables, cache.layout.max_model_len)


def decode_rows(plan: BatchPlan, sampler: Sampler) -> DecodeRows | None:
    """What a step computes in which everyone brings its newest token, what a grammar has forced after it, and proposals
    (`drafts` says how many), draws what follows, and wants nothing else; None if it does more."""
    decodes, others = plan.decodes, plan.sequences
    ones = np.ones(len(decodes), np.int32)
    if not others:
        return DecodeRows(decodes.slots, decodes.starts, decodes.token_ids, ones, 0 * ones) if len(decodes) else None
    if not all(_is_plain(part, sampler) for part in others):
        return None
    slots, starts, drafts = ([getattr(part, name) for part in others] for name in ("slot", "start", "drafts"))
    counts, ids = [len(part.token_ids) for part in others], chain.from_iterable(part.token_ids for part in others)
    columns = (
        (decodes.slots, slots),
        (decodes.starts, starts),
        (decodes.token_ids, [*ids]),
        (ones, counts),
        (0 * ones, drafts),
    )
    return DecodeRows(*(np.append(first, rest).astype(np.int32) for first, rest in columns))


def _is_plain(part: SequencePlan, sampler: Sampler) -> bool:
    if not part.sample or part.parents or part.score_ids or part.scratch or not part.start:
        return False
    most = 1 + MAX_FORCED_TOKENS if sampler.grammars.binds(part.slot) else 1
    return len(part.token_ids) - part.drafts <= most and sampler.table.states[part.slot].params.logprobs is None
