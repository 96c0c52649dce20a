"""Speculation end to end: tokens per second with and without it, on one engine, in turns.

The target is quire-mini enlarged (`benchmarks/upscale.py`), which costs what an 8B model costs and says what quire-mini
says, so that drafts are accepted as they would be. It is made once and kept in Quire's cache folder.
"""

import gc
import itertools
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import serving
from benchmarks.gpu.measure import Meter, Row
from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, Tokens, single_events
from quire.core.request import Request, SamplingParams
from quire.engine.engine import Engine
from quire.kernels.backend import Backend
from quire.models.loading import load_runner
from quire.models.placement import Placement
from quire.models.runner import ModelRunner
from quire.scheduler.loop import EngineLoop, scheduler_config
from quire.scheduler.scheduler import Scheduler
from quire.speculation.loading import DRAFT_FOLDER, cache_share, load_draft, make_drafter

MINI = Path(__file__).resolve().parents[2] / "models" / "quire-mini"
PRESET = "8b"
BATCHES = (1, 8, 64)
PROMPT, OUTPUT, ROUNDS = 256, 96, 3
_names = itertools.count()


@dataclass(frozen=True, slots=True)
class Turn:
    """A batch served once; what counts are the steps in which all of it generates."""

    rate: float
    """Tokens per second."""
    drafts: int
    accepted: int
    """Draft tokens."""


def drafting_engine(runner: ModelRunner, config: EngineConfig, place: Placement, *, measure: bool) -> Engine:
    """An engine over a runner that is loaded already; `measure`: find what steps cost, as the server does at start."""
    draft = load_draft(config, runner, place, lambda phase, done, total: None)
    engine = Engine(runner, config, "native", place, 0.0 if draft is None else cache_share(draft, runner))
    lengths = {"max_model_len": engine.info.max_model_len, "num_slots": config.max_num_seqs}
    drafter = make_drafter(config, runner, draft, engine.cache, place, **lengths)
    assert drafter is not None
    engine.draft_with(drafter, config)
    if measure:
        engine.warm_up()
    return engine


def serve(loop: EngineLoop, prompts: Sequence[Sequence[int]], output: int, speculate: bool) -> Turn:
    """Serve the prompts greedily. Raises `RuntimeError` if a request fails."""
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    for prompt in prompts:
        name = RequestId(f"s{next(_names)}")
        loop.submit(Request(id=name, prompt_ids=tuple(prompt), params=params, speculate=speculate))
    began: set[RequestId] = set()
    ended, tokens, seconds, before, after = False, 0, 0.0, None, None
    while loop.has_work:
        steady = len(began) == len(prompts) and not ended
        started = time.perf_counter()
        report = loop.step()
        spent, new = time.perf_counter() - started, 0
        for event in single_events(report.events):
            if isinstance(event, Failed):
                raise RuntimeError(event.error.message)
            if isinstance(event, Tokens):
                began.add(event.request_id)
                new += len(event.token_ids)
            ended |= isinstance(event, Finished)
        after = report.stats.speculation
        before = before or after
        if steady:
            seconds, tokens = seconds + spent, tokens + new
    assert before is not None and after is not None
    accepted = after.accepted_tokens - before.accepted_tokens
    return Turn(tokens / max(seconds, 1e-9), after.drafts - before.drafts, accepted)


def compare(
    engine: Engine, prompts: Sequence[Sequence[int]], output: int, rounds: int
) -> tuple[list[Turn], list[Turn]]:
    """With and without speculation, in turns; one round more is run first, and not counted."""
    batch = len(prompts)
    rows = max(2048, 17 * batch)
    limits = scheduler_config(
        engine.info, max_num_seqs=batch, max_batch_tokens=rows, max_waiting=1024, prefix_cache=False
    )
    loop = EngineLoop(engine, Scheduler(limits))
    turns: dict[bool, list[Turn]] = {True: [], False: []}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for speculate in (True, False) if number % 2 else (False, True):
                turn = serve(loop, prompts, output, speculate)
                if number:
                    turns[speculate].append(turn)
    return turns[True], turns[False]


def comparison_row(case: str, contender: str, turns: tuple[list[Turn], list[Turn]]) -> Row:
    """Microseconds per token with speculation, and in the note the ratio to none."""
    on, off = turns
    ratio = statistics.median(a.rate / b.rate for a, b in zip(on, off, strict=True))
    drafts, accepted = sum(turn.drafts for turn in on), sum(turn.accepted for turn in on)
    rate = statistics.median(turn.rate for turn in on)
    note = f"{ratio:.2f} x none; {rate:,.0f} tokens/s; {1 + accepted / max(drafts, 1):.2f} tokens per draft"
    return Row("speculation", case, contender, 1e6 / rate, None, note)


def code_prompts(model: Path, count: int) -> list[list[int]]:
    """Slices of the standard library's sources."""
    from tokenizers import Tokenizer  # comes with transformers

    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / f"{name}.py").read_text() for name in ("argparse", "ast", "inspect", "typing"))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    starts = [(number * 997) % (len(ids) - PROMPT) for number in range(count)]
    return [ids[start : start + PROMPT] for start in starts]


def rows(meter: Meter, dtype: torch.dtype, backend: Backend) -> Iterator[Row]:
    """Every drafter at every batch size; what cannot run says why."""
    from benchmarks.upscale import cached

    place = Placement(meter.device, dtype, backend)
    try:
        target = cached(MINI, PRESET)
        runner = load_runner(
            str(target), place=place, runner="native", trust_remote_code=False, on_progress=lambda *progress: None
        )
    except Exception as error:  # no disk for it, say: the other results stand
        yield Row("speculation", f"quire-mini as {PRESET}", backend, None, note=f"{type(error).__name__}: {error}")
        return
    draft = MINI / DRAFT_FOLDER
    drafters = {"ngram": "ngram", "quire-mini": str(MINI)} | ({"its draft": str(draft)} if draft.is_dir() else {})
    for (name, setting), batch in itertools.product(drafters.items(), BATCHES):
        gc.collect()
        torch.cuda.empty_cache()
        case = f"quire-mini as {PRESET}, {batch} x {PROMPT} + {OUTPUT}"
        try:
            config = EngineConfig(
                model=str(target), draft=setting, max_num_seqs=batch, max_batch_tokens=max(2048, 17 * batch),
                max_model_len=2 * (PROMPT + OUTPUT), prefix_cache=False, dtype="bfloat16",
            )  # fmt: skip
            engine = drafting_engine(runner, config, place, measure=True)
            turns = compare(engine, code_prompts(target, batch), OUTPUT, ROUNDS)
            yield comparison_row(case, f"{backend}, {name}", turns)
        except Exception as error:  # one that fails must not take the other results with it
            yield Row("speculation", case, f"{backend}, {name}", None, note=f"{type(error).__name__}: {error}"[:200])


def tiny_rows(meter: Meter, dtype: torch.dtype, backend: Backend) -> Iterator[Row]:
    """A random network that n-grams draft for."""
    network, load = serving.TINY, serving.TINY_LOADS[0]
    plain = serving.random_engine(network, meter.device, dtype, backend, load, graphs=False)
    place = Placement(meter.device, dtype, backend)
    config = EngineConfig(
        model=network.name, draft="ngram", draft_tokens=2, max_num_seqs=2, max_model_len=32, cuda_graphs=False
    )
    engine = drafting_engine(plain._runner, config, place, measure=False)
    turns = compare(engine, [[1, 2, 3, 1, 2, 3, 1, 2], [4, 5, 4, 5, 4]], 3, 1)
    yield comparison_row(f"{network.name}, 2 x 8 + 3", f"{backend}, ngram", turns)
