"""`SimulatedEngine`: takes the time that a device would, in virtual time, and says when a sequence ends."""

import numpy as np

from quire.core.messages import EngineInfo
from quire.core.model_spec import ModelSpec
from quire.core.plan import BatchPlan, SequenceOutput, SequencePlan, StepOutput

from .device import Device
from .traffic import EOS, FILLER

PAGE_SIZE = 16


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedEngine:
    """An engine without a model.

    A page of the simulation is a whole bundle: without windows and pruning the pages of all heads come and go together,
    so the scheduler decides the same and costs less.
    """

    def __init__(self, device: Device, clock: VirtualClock, max_num_seqs: int, num_pages: int) -> None:
        self.device = device
        self.clock = clock
        self.info = _info(device, num_pages)
        self.lengths: dict[int, int] = {}
        """By seed: how many tokens, prompt included, the sequence will have. The scheduler is not told."""
        self._ends = np.zeros(max_num_seqs, np.int64)
        """The same by slot."""

    is_asynchronous = False

    def finish(self, launched: StepOutput) -> StepOutput:
        """`launch` has done everything."""
        return launched

    def launch(self, plan: BatchPlan) -> StepOutput:
        """Let the time of the batch pass."""
        for assignment in plan.assignments:
            self._ends[assignment.slot] = self.lengths[assignment.seed]
        decodes = plan.decodes
        entries = pairs = float(decodes.starts.sum()) + len(decodes)
        for part in plan.sequences:
            count = len(part.token_ids)
            entries += part.start + count
            pairs += count * (part.start + (count + 1) / 2)
        seconds = self.device.step_seconds(plan.num_tokens, entries, pairs)
        self.clock.now += seconds
        sampled = np.where(decodes.starts + 2 >= self._ends[decodes.slots], EOS, FILLER).astype(np.int32)
        return StepOutput(tuple(self._result(part) for part in plan.sequences), seconds, decoded=sampled)

    def _result(self, part: SequencePlan) -> SequenceOutput:
        if not part.sample:
            return SequenceOutput()
        ends = part.start + len(part.token_ids) + 1 >= self._ends[part.slot]
        return SequenceOutput((EOS if ends else FILLER,))


def _info(device: Device, num_pages: int) -> EngineInfo:
    model = device.model
    spec = ModelSpec(
        name=model.name,
        architecture="simulated",
        num_layers=1,
        num_kv_heads=1,
        num_heads=1,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_context=model.max_model_len,
        windows=(None,),
        eos_token_ids=(EOS,),
    )
    return EngineInfo(
        model=spec,
        runner="native",
        device=device.name,
        dtype="bfloat16",
        max_model_len=model.max_model_len,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        kv_bytes=num_pages * PAGE_SIZE * model.kv_bytes,
        max_concurrency=num_pages * PAGE_SIZE / model.max_model_len,
    )
