"""`Engine`: computes one step. The scheduler says what, a runner knows the network; here are tensors and order."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..core.config import EngineConfig
from ..core.errors import ModelLoadError
from ..core.ids import SlotId
from ..core.messages import EngineInfo, GrammarCounts
from ..core.model_spec import ModelSpec
from ..core.plan import BatchPlan, SequenceOutput, SequencePlan, StepOutput
from ..core.prefix import StoredBlock
from ..core.request import Grammar
from ..core.speculation import MAX_DRAFT_TOKENS, DraftInfo, StepCosts
from ..kernels.decode_step_cpu import DecodeRows, DecodeStepCPU
from ..models.checkpoint import open_checkpoint
from ..models.context import PageSelector
from ..models.loading import load_runner
from ..models.native import NativeRunner
from ..models.placement import Placement
from ..models.runner import ModelRunner, ProgressCallback
from ..speculation.drafter import Drafter
from ..speculation.loading import cache_share, load_draft, make_drafter
from . import draft_swap, snapshot
from .allocation import allocate, allocate_host
from .device import choose_placement
from .expansion import Expansion, unspeculative
from .graphs import CudaCapture, DecodeGraphs
from .inputs import LogitLayout, build_inputs, logit_layout
from .launched import NOTHING_SPENT, LaunchedStep, Spent
from .observe import StepObserver
from .page_selection import PageSelection
from .parking import Parking
from .pruning import Pruner, offered_policies, offered_refinements
from .sampler import Sampler
from .settling import redo, redo_rows, settle
from .sizing import cache_layout, num_host_pages, num_pages, pages_per_sequence
from .speculation import NOTHING_TOLD, Speculation
from .staging import upload
from .step_costs import AnyTokens, CostProbe
from .timer import StepTimer
from .warm_up import first_chunk
from .whole_decodes import decode_rows, decode_step, verified_rows, verify_at_once


class Engine:
    """Runs a model over a paged KV cache, one `BatchPlan` at a time; for one thread.

    `launch` queues a step, `finish` waits for its results. A second step may be launched in between if neither has
    anything but decodes and page changes: their results are tokens, and those the device hands from one to the next.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        kind: Literal["native", "transformers"],
        place: Placement,
        draft_share: float = 0.0,
    ) -> None:
        """Allocate the cache for an already loaded runner; raises `ConfigError` if too little memory is left for it.

        draft_share: bytes to leave for a draft's cache per byte of this one, where `config` does not say how large.
        """
        self._runner = runner
        self._place = place
        layout = cache_layout(config, runner.spec, place.dtype)
        per_sequence = pages_per_sequence(config, runner.spec, layout)
        enough = config.max_num_seqs * per_sequence
        pages = num_pages(layout, config.kv_memory, place.device, enough, draft_share)
        self.cache = allocate(layout, pages, place.device)
        self.sampler = Sampler(config.max_num_seqs, runner.spec.vocab_size, place.device, place.backend)
        host_pages = num_host_pages(layout, config.swap_memory)
        self.host = allocate_host(self.cache, host_pages) if host_pages else None
        self._pruner = Pruner(self.cache, runner, place.backend)
        self._selection = PageSelection(self.cache, runner.spec, place.backend)
        self.parking = Parking(self._pruner, self._selection)
        self._timer = StepTimer(place.device)
        self._graphs: DecodeGraphs | None = None
        # The library's modelling code may read the device in a step, and xformers builds its masks on the host.
        if config.cuda_graphs and kind == "native" and place.device.type == "cuda" and place.backend == "triton":
            drafts = 0 if config.draft == "none" else config.draft_tokens or MAX_DRAFT_TOKENS
            graphs = runner, self.cache, config.max_num_seqs, place.backend, CudaCapture(), drafts
            self._graphs = DecodeGraphs(*graphs, self.sampler.grammars.binds)
        self._decode_step = decode_step(runner, self.cache, self.sampler.table)
        self._speculation: Speculation | None = None
        self._max_rows = config.max_batch_tokens
        self._max_lengths = np.full(config.max_num_seqs, layout.max_model_len, np.int64)
        self.info = EngineInfo(
            model=runner.spec,
            runner=kind,
            device=place.device_name,
            dtype=place.dtype_name,
            max_model_len=layout.max_model_len,
            max_stream_len=max(layout.max_model_len, config.max_stream_len or 0),
            page_size=layout.page_size,
            num_pages=self.cache.num_pages,
            kv_bytes=self.cache.num_bytes,
            num_host_pages=host_pages,
            max_concurrency=self.cache.num_pages / per_sequence,
            policies=offered_policies(runner),
            refinements=offered_refinements(runner),
        )

    @staticmethod
    def load(config: EngineConfig, on_progress: ProgressCallback) -> "Engine":
        """Load the model, allocate the cache and run a first step; `on_progress` gets (phase, done, total).

        Raises `ModelLoadError` where the model cannot be served and `ConfigError` where the settings do not fit it or
        the machine.
        """
        place = choose_placement(config)
        runner = load_runner(
            config.model,
            place=place,
            runner=config.runner,
            trust_remote_code=config.trust_remote_code,
            on_progress=on_progress,
        )
        kind: Literal["native", "transformers"] = "native" if isinstance(runner, NativeRunner) else "transformers"
        draft = load_draft(config, runner, place, on_progress)
        engine = Engine(runner, config, kind, place, 0.0 if draft is None else cache_share(draft, runner))
        lengths = {"max_model_len": engine.info.max_model_len, "num_slots": config.max_num_seqs}
        drafter = make_drafter(config, runner, draft, engine.cache, place, **lengths)
        if drafter is not None:
            engine.draft_with(drafter, config)
        engine.sampler.grammars.read(open_checkpoint(config.model).folder, engine.spec)
        on_progress("warming up", 0, 1)
        engine.warm_up()
        on_progress("warming up", 1, 1)
        return engine

    def draft_with(self, drafter: Drafter, config: EngineConfig) -> None:
        """Let a drafter propose, from now on; to be called before any step."""
        readers = self._pruner.watches, self._selection.selects
        self._speculation = Speculation(drafter, self.sampler, self.info.max_stream_len, readers)
        draft = DraftInfo(
            method=drafter.method,
            name=drafter.method if config.draft == "auto" else config.draft,
            most=config.draft_tokens or MAX_DRAFT_TOKENS,
            fixed=config.draft_tokens is not None,
            num_bytes=drafter.num_bytes,
        )
        self.info = msgspec.structs.replace(self.info, draft=draft)

    def compile_grammar(self, grammar: Grammar) -> None:
        """So that a sequence bound to it enters at once; on any thread. Raises `InvalidRequestError`."""
        self.sampler.grammars.compile(grammar)

    def knows_grammar(self, grammar: Grammar) -> bool:
        """Whether that would take no time."""
        return self.sampler.grammars.knows(grammar)

    def grammar_counts(self) -> GrammarCounts:
        """Of what was compiled and forced."""
        return self.sampler.grammars.counts()

    def fetch_draft(self, folder: str) -> None:
        """See `draft_swap.fetch`: on any thread, before `replace_draft`."""
        draft_swap.fetch(folder)

    def replace_draft(self, folder: str, config: EngineConfig) -> None:
        """Draft with the model in a folder from now on, see `draft_swap.replace_draft`; between steps."""
        drafter = None if self._speculation is None else self._speculation.drafter
        known = self.info, config, self._runner, self.cache, self._place
        drafter, draft = draft_swap.replace_draft(folder, drafter, *known)
        assert self._speculation is not None, "else there is nobody to replace"
        self._speculation.drafter = drafter
        self.info = msgspec.structs.replace(self.info, draft=draft)

    @property
    def spec(self) -> ModelSpec:
        """Shape facts of the model."""
        return self._runner.spec

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns before the batch is computed."""
        return self._place.device.type == "cuda"

    def step(self, plan: BatchPlan) -> StepOutput:
        """Compute one batch: page changes, forward pass, sampling, prunes. Outputs are aligned with the plan."""
        return self.finish(self.launch(plan))

    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Queue page changes, forward pass and sampling."""
        if plan.changes_hands:
            self._change_hands(plan)
        if not plan.asks_drafts:
            return self._launch(plan)
        if self._speculation is None:
            return self._launch(unspeculative(plan))
        proposed = self._speculation.propose(plan)
        spent = Spent.by(proposed)
        if not proposed.counts.any():
            return self._launch(unspeculative(plan), spent)
        if self._decode_step is not None and not self._looks and (rows := verified_rows(plan, proposed, self.sampler)):
            return verify_at_once(plan, self._decode_step, rows, proposed)
        expansion = self._speculation.expand(plan, proposed)
        return self._compute(expansion.plan, spent, expansion)

    @property
    def _looks(self) -> bool:
        """Whether anybody may want to see how layers attend, or pick what they see."""
        return self._pruner.looks_on or self._selection.picks

    def _launch(self, plan: BatchPlan, spent: Spent = NOTHING_SPENT) -> LaunchedStep:
        """`launch` of a plan without proposals."""
        if self._decode_step is not None and not self._looks and (rows := decode_rows(plan, self.sampler)):
            return self._decode_at_once(plan, self._decode_step, rows, spent)
        return self._compute(plan, spent) if plan.num_tokens else LaunchedStep(plan)

    @torch.inference_mode()
    def _change_hands(self, plan: BatchPlan) -> None:
        """All that a plan changes before the forward pass, in the order it promises."""
        self.parking.leave(plan)
        if self.host is not None:
            self.host.copy_out(plan.swap_outs)
        self._pruner.compact(plan.compactions)
        if self.host is not None:
            self.host.copy_in(plan.swap_ins)
        for assignment in plan.assignments:
            self.sampler.table.assign(assignment)
            self.sampler.grammars.assign(assignment)
            self._pruner.assign(assignment)
            self._selection.assign(assignment)
            if self._speculation is not None:
                self._speculation.assign(assignment)
            self._max_lengths[assignment.slot] = assignment.max_length
        self.parking.come_back(plan)
        self.cache.apply(plan)

    @torch.inference_mode()
    def finish(self, launched: LaunchedStep) -> StepOutput:
        """Wait for a step's tokens, score, choose what prunes keep. In the order of the launches."""
        plan, layout, logits = launched.plan, launched.layout, launched.logits
        decoded, apart = np.empty(0, np.int32), dict[int, SequenceOutput]()
        outputs, recorded = tuple(SequenceOutput() for _ in plan.sequences), dict[int, tuple[bytes, ...]]()
        if launched.drawn is not None:
            assert layout is not None and logits is not None
            decoded, outputs, recorded = self.sampler.outputs(plan, layout, logits, launched.drawn)
            apart = self.sampler.follow(plan.decodes.slots, decoded)
        elif launched.decoded is not None:
            decoded, outputs, apart = self.sampler.told(plan, launched.decoded)
        runs, expansion, spent = launched.runs, launched.expansion, launched.spent
        if self._speculation is not None and (decoded.size or outputs):
            self._speculation.note(plan, decoded, outputs, apart, runs)
            if runs is not None:
                redo_rows(plan.decodes, decoded, runs, self.cache, self.step)
            if expansion is not None:
                settle(launched, outputs, self.cache)
                outputs = redo(plan, outputs, self.cache, self.step)
        if expansion is not None:
            plan, recorded = expansion.whole, expansion.fold_recorded(recorded, outputs)
            decoded, runs, outputs, apart = expansion.fold(decoded, outputs, apart)
        times = (0.0, 0.0) if launched.moments is None else self._timer.seconds(*launched.moments)
        kept, seconds = self._pruner.choose(plan.prunes)
        copied = (0, 0.0) if self.host is None else self.host.timing()
        paid = spent.draft_seconds, self.sampler.grammars.spent()
        told = NOTHING_TOLD if self._speculation is None else self._speculation.report(plan)
        return StepOutput(
            outputs, *times, decoded, kept, seconds, *copied, *paid, recorded, apart,
            told.foreseen, told.foresight_seconds, spent.caught_up, told.recalled, runs,
        )  # fmt: skip

    @torch.inference_mode()
    def _compute(self, plan: BatchPlan, spent: Spent, expansion: Expansion | None = None) -> LaunchedStep:
        """Forward pass and sampling of a plan that has its proposals, see `Expansion`."""
        started = self._timer.now()
        watchers = self._pruner.observer(plan), self._selection.selector(plan)
        unwatched = watchers == (None, None)  # what a graph or one call computes nobody looks into
        if self._decode_step is not None and unwatched and (rows := decode_rows(plan, self.sampler)):
            return self._decode_at_once(plan, self._decode_step, rows, spent, expansion)
        replayed = self._decode(plan) if unwatched else None
        logits, layout = replayed or self._forward(plan, *watchers)
        computed = self._timer.now()
        distributions = None if expansion is None else expansion.distributions
        drawn = self.sampler.draw(plan, layout, logits, distributions) if len(layout.rows) else None
        moments = started, computed, self._timer.now()
        return LaunchedStep(plan, layout, logits, drawn, moments, watchers[0], spent, expansion=expansion)

    def _decode_at_once(
        self, plan: BatchPlan, call: DecodeStepCPU, rows: DecodeRows, spent: Spent, expansion: Expansion | None = None
    ) -> LaunchedStep:
        """`_compute` of nothing but decodes by one call, but for the choice of tokens where somebody alters logits or
        drafts are verified.

        That takes no operation of torch's, so it does without the mode that those want: entering it would show.
        """
        masks, grammars = None, self.sampler.grammars
        if grammars and not rows.proposals:
            masks = grammars.masks(grammars.bound(rows.slots), rows.starts + rows.counts)
        started = time.perf_counter()
        step = call(rows, masks)
        computed = started + step.forward_seconds
        if step.tokens is not None:
            moments = started, computed, computed + step.sample_seconds
            return LaunchedStep(plan, moments=moments, spent=spent, decoded=step.tokens, expansion=expansion)
        distributions = None if expansion is None else expansion.distributions
        with torch.inference_mode():
            layout, logits = logit_layout(plan), call.logits(len(rows.slots) + rows.proposals)
            drawn = self.sampler.draw(plan, layout, logits, distributions, masks)
        moments = started, computed, time.perf_counter()
        return LaunchedStep(plan, layout, logits, drawn, moments, spent=spent, expansion=expansion)

    def _forward(
        self, plan: BatchPlan, observer: StepObserver | None, selector: PageSelector | None
    ) -> tuple[Tensor, LogitLayout]:
        """Logits [R, V] of any batch; its entries are in the cache."""
        newest = self.sampler.table.newest
        inputs = build_inputs(plan, self.cache, self._max_lengths, newest, self._place.backend)
        inputs.context.observer, inputs.context.selector = observer, selector
        logits = self._runner.forward(
            inputs.input_ids, inputs.rotations, inputs.lengths, inputs.context, inputs.logit_rows
        )
        self._pruner.note(inputs.context.scorings)
        self.cache.advance(inputs.slots, inputs.new_entries, inputs.host_slots, inputs.host_lengths)
        return logits, inputs.layout

    def _decode(self, plan: BatchPlan) -> tuple[Tensor, LogitLayout] | None:
        """`_forward` by a graph, if there are any and they take the plan."""
        if self._graphs is None or not self._graphs.takes(plan):
            return None
        step = self._graphs.run(plan, self._max_lengths, self.sampler.table.newest)
        if step is None:
            return None
        self.cache.advance(step.slots, step.new_entries, step.host_slots, step.host_lengths)
        layout = logit_layout(plan)
        every = len(layout.rows) == len(step.logits)
        return step.logits if every else step.logits[upload(layout.rows, self._place.device)], layout

    def save_prefixes(self, path: Path, blocks: Sequence[StoredBlock]) -> None:
        """Write the blocks' pages to a file, see `engine.snapshot`; raises `OSError` or `ModelLoadError`."""
        if self.host is not None:
            self.host.settle()
        host = self.host.tensors if self.host else ()
        snapshot.write(path, self._fingerprint(), blocks, self.cache.page_tensors, host)

    def stored_prefixes(self, path: Path) -> list[bytes]:
        """Names of the blocks in a file, in its order; raises `ConfigError` if none of them can be used here."""
        return snapshot.read_digests(path, self._fingerprint())

    @torch.inference_mode()
    def load_prefixes(self, path: Path, skipped: int, blocks: Sequence[StoredBlock]) -> None:
        """Fill the pages of the file's blocks after the `skipped` first ones; raises `ConfigError` if it is broken."""
        host = self.host.tensors if self.host else ()
        snapshot.read_blocks(path, skipped, blocks, self.cache.page_tensors, host)

    def _fingerprint(self) -> str:
        return snapshot.fingerprint(self.info, self.cache.layout)

    def warm_up(self) -> None:
        """Run one chunk and one decode through the real path, and find what steps cost where somebody drafts.

        Leaves no trace in cache or sampler. Raises `ModelLoadError` if the model gives values that are not finite.
        """
        chunk, pages = first_chunk(self.info, self.cache.num_pages)
        (first,) = self.step(chunk).sequences
        known = len(chunk.sequences[0].token_ids)
        decode = BatchPlan((SequencePlan(SlotId(0), known, first.token_ids or (0,), sample=True),))
        (second,) = self.step(decode).sequences
        if first.error or second.error:
            raise ModelLoadError(
                f"{self.spec.name}: {first.error or second.error} in {self.info.dtype}; the weights may be damaged, "
                "or the model may need another dtype"
            )
        self._forget_all(pages)
        if self._speculation is not None and self.info.draft is not None:
            draft = msgspec.structs.replace(self.info.draft, costs=self._step_costs(self._speculation, self.info.draft))
            self.info = msgspec.structs.replace(self.info, draft=draft)

    def _step_costs(self, speculation: Speculation, draft: DraftInfo) -> StepCosts:
        """Of steps and of the drafter."""
        probe = CostProbe(self.info, draft.most, self.sampler.table.num_slots, self._max_rows)
        self._speculation = Speculation(AnyTokens(), self.sampler, self.info.max_stream_len)
        rows = probe.rows(self.step, rehearse=self._place.device.type == "cuda")
        self._speculation = speculation
        costs = StepCosts(rows=rows, drafts=probe.drafts(self.step, speculation.propose))
        self._forget_all(probe.num_pages)
        return costs

    def _forget_all(self, pages: int) -> None:
        """The state before any step, of which all used only the first `pages` pages."""
        self.cache.clear(torch.arange(pages, device=self._place.device))
        self.sampler.table.clear()
        self.sampler.grammars.clear()
        self._pruner.clear()
        if self._speculation is not None:
            self._speculation.clear()
