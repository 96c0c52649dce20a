"""Steps of nothing but decodes on a CPU, as one call of a kernel over the engine's own tables."""

from ..kernels.decode_step_cpu import DecodeStepCPU, SlotTables
from ..models.native import NativeRunner
from ..models.runner import ModelRunner
from .cache import KVCache
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
