"""Another draft model, or none, for an engine that is serving: loaded, tried and timed before it is believed."""

import logging
from pathlib import Path

import msgspec
import torch

from ..core.config import EngineConfig
from ..core.errors import ConfigError, InvalidRequestError
from ..core.messages import EngineInfo
from ..core.plan import BatchPlan
from ..core.speculation import DraftChoice, DraftInfo, StepCosts
from ..models.checkpoint import open_checkpoint
from ..models.placement import Placement
from ..models.runner import ModelRunner
from ..speculation.drafter import Drafter
from ..speculation.hybrid import HybridDrafter
from ..speculation.loading import load_draft, make_drafter, ngrams
from ..speculation.model import ModelDrafter
from ..speculation.ngram import NgramDrafter
from ..speculation.target import TargetCache
from .sampler import Sampler
from .speculation import Speculation
from .step_costs import CostProbe

NGRAMS = "ngram"
"""In place of a folder: no model. A folder of that name is `./ngram`."""
_CHUNK = 2**24
"""Bytes read at a time."""
log = logging.getLogger("quire")


def fetch(folder: str) -> None:
    """Read a draft's files from wherever they lie, on any thread: loading them, for which steps wait, then finds them
    in the system's cache. Raises `InvalidRequestError` where the folder holds no whole checkpoint. N-grams have none.
    """
    if folder == NGRAMS:
        return
    try:
        if not Path(folder).is_dir():
            raise InvalidRequestError(f"{folder} is not a folder on the server", param="draft")
        for path in sorted({entry.file for entry in open_checkpoint(folder).tensors.values()}):
            with path.open("rb", buffering=0) as file:
                while file.read(_CHUNK):
                    pass
    except InvalidRequestError:
        raise
    # Also a name too long, no leave to look, a file of a form that nobody foresaw: whoever asked is waiting.
    except Exception as error:
        raise InvalidRequestError(f"the draft cannot be used: {_first_line(error)}", param="draft") from error


def replace_draft(
    folder: str,
    drafter: Drafter | None,
    info: EngineInfo,
    config: EngineConfig,
    target: ModelRunner,
    cache: TargetCache,
    place: Placement,
) -> tuple[Drafter, DraftInfo]:
    """Let the draft model in `folder` take the place of the drafter's, or join its n-grams; or let these draft alone
    again (`NGRAMS`). Who drafts then, and what there is to know of it.

    Between steps only, which wait meanwhile. Sequences go on: the new model computes what its cache lacks of them when
    it drafts. Raises `InvalidRequestError` where the drafter is of another kind or the new model cannot be used; then
    the old one goes on.
    """
    if drafter is None or info.draft is None or info.draft.method == "layerskip":
        now = "nobody drafts" if info.draft is None else f"{info.draft.method} drafts"
        raise InvalidRequestError(f"no draft model can be used: {now} on this server", param="draft")
    if folder == NGRAMS:
        return _ngrams_alone(drafter, info.draft, info, config, place)
    name = DraftChoice("model" if info.draft.method == "model" else "hybrid", model=str(Path(folder).resolve())).name
    wanted = msgspec.structs.replace(config, draft=name)
    try:
        runner = load_draft(wanted, target, place, lambda phase, done, total: None)
        assert runner is not None, "the name is a model's"
        new, old = drafter, None
        if isinstance(drafter, NgramDrafter):
            lengths = {"max_model_len": info.max_model_len, "num_slots": config.max_num_seqs}
            new = make_drafter(wanted, target, runner, cache, place, **lengths) or drafter
        model = new.model if isinstance(new, HybridDrafter) else new
        assert isinstance(model, ModelDrafter)
        if new is drafter:
            old = model.replace(runner)
    except ConfigError as error:
        raise InvalidRequestError(error.message, param="draft") from error
    # No memory, a file that changes as it is read, or whatever a model's code raises of its configuration.
    except Exception as error:
        log.exception("the draft %s could not be loaded", folder)
        raise InvalidRequestError(f"the draft cannot be loaded: {_first_line(error)}", param="draft") from error
    try:
        costs = StepCosts(rows=info.draft.costs.rows, drafts=_costs(model, info, target, place))
    # Whatever a model's code raises: what cannot run must not be met by the next step.
    except Exception as error:
        log.exception("the draft %s failed its trial", folder)
        if old is not None:
            model.replace(old)
        raise InvalidRequestError(f"the draft cannot be run: {_first_line(error)}", param="draft") from error
    log.info("drafts by %s from now on", name)
    known = {"method": new.method, "name": name, "num_bytes": new.num_bytes, "costs": costs}
    return new, msgspec.structs.replace(info.draft, **known)


def _ngrams_alone(
    drafter: Drafter, draft: DraftInfo, info: EngineInfo, config: EngineConfig, place: Placement
) -> tuple[Drafter, DraftInfo]:
    if draft.method == "model":
        raise InvalidRequestError("no n-grams draft on this server: its model has nobody to leave it to", param="draft")
    if isinstance(drafter, HybridDrafter):
        drafter = ngrams(config.max_num_seqs, info.max_stream_len, place)
        log.info("n-grams draft alone from now on")
    known = {"method": drafter.method, "name": NGRAMS, "num_bytes": drafter.num_bytes}
    return drafter, msgspec.structs.replace(draft, **known, costs=StepCosts(rows=draft.costs.rows))


@torch.inference_mode()
def _costs(model: ModelDrafter, info: EngineInfo, target: ModelRunner, place: Placement) -> list[tuple[int, float]]:
    """What proposals take, as at start, but with slots and tokens of the trial's own and in the draft's cache alone,
    which is empty before and after."""
    assert info.draft is not None
    slots = model.num_slots
    sampler = Sampler(slots, target.spec.vocab_size, place.device, place.backend)
    trial = Speculation(model, sampler, info.max_model_len)

    def enter(plan: BatchPlan) -> None:
        for assignment in plan.assignments:
            sampler.table.assign(assignment)
            trial.assign(assignment)

    costs = CostProbe(info, info.draft.most, slots, slots).drafts(enter, trial.propose)
    trial.clear()
    return costs


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
