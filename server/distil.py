"""`quire distill`: from options to a distillation, whose text comes from this server's own engine."""

import time
from collections.abc import Sequence
from typing import Any

from ..core.config import embedded_model
from ..core.errors import ConfigError
from ..core.request import SamplingParams
from .lists import items
from .llm import LLM

SEQUENCES_AT_ONCE = 64
FEW_STEPS, MORE_STEPS = 4, 20
"""A step's time is what the longer of two runs takes more, per step."""
TIMED_RUNS = 2
PROMPT_TOKENS = 64
FIRST_CUT = "layers:2"
"""How a draft begins where nothing is said."""
_WIDTHS = ("mlp", "kv_heads", "hidden")
_SCHEDULE = ("steps", "batch_rows", "micro_rows", "round_rows", "passes", "rate")


class OfflineEngines:
    """`distill.rounds.Engines`: the offline API, with the newest checkpoint kept loaded."""

    def __init__(self, settings: dict[str, Any], target: str) -> None:
        """settings: fields of `core.config.EngineConfig` for all checkpoints."""
        self._settings = settings
        self._target = target
        self._llm: LLM | None = None

    def generate(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        """The generated tokens of each prompt, in order."""
        llm = self._load(checkpoint, SEQUENCES_AT_ONCE)
        return [done.choices[0].token_ids for done in llm.generate(prompts, params, progress=False)]

    def step_seconds(self, checkpoint: str, sizes: Sequence[int]) -> dict[int, float]:
        """Seconds of a decode step of each number of sequences, the least of a few runs."""
        settings = self._settings | {"max_model_len": PROMPT_TOKENS + MORE_STEPS, "max_num_seqs": max(sizes)}
        llm = LLM(checkpoint, prefix_cache=False, draft="none", **settings)
        return {size: _step_seconds(llm, size) for size in sizes}

    def _load(self, checkpoint: str, sequences: int) -> LLM:
        """The target stays loaded; a draft changes from call to call."""
        if checkpoint != self._target:
            return LLM(checkpoint, max_num_seqs=sequences, draft="none", **self._settings)
        if self._llm is None:
            self._llm = LLM(checkpoint, max_num_seqs=sequences, draft="none", **self._settings)
        return self._llm


def _step_seconds(llm: LLM, size: int) -> float:
    """Seconds of a decode step of `size` sequences."""
    vocab = llm.info.model.vocab_size
    prompts = [[(7 * i + 3 * j) % vocab for j in range(PROMPT_TOKENS)] for i in range(size)]
    seconds = {}
    for steps in (FEW_STEPS, MORE_STEPS):
        params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
        seconds[steps] = min(_seconds(llm, prompts, params) for _ in range(TIMED_RUNS))
    return max(1e-9, (seconds[MORE_STEPS] - seconds[FEW_STEPS]) / (MORE_STEPS - FEW_STEPS))


def _seconds(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float:
    started = time.perf_counter()
    llm.generate(prompts, params, progress=False)
    return time.perf_counter() - started


def distil(options: dict[str, Any]) -> None:
    """Run the command with its options by name. Raises `QuireError`; `KeyboardInterrupt` when it was stopped."""
    from ..distill.distillation import Distillation  # torch and transformers: seconds
    from ..distill.draft_init import Init
    from ..distill.draft_trainer import Schedule
    from ..distill.rounds import Mixture
    from ..distill.run_settings import Settings

    rest = dict(options)
    target = str(rest.pop("target") or embedded_model())
    engine = {name: rest[name] for name in ("device", "trust_remote_code")}
    engines = OfflineEngines(engine | {"max_model_len": rest["length"]}, target)
    traffic = rest.pop("from_traffic")
    files = [*(rest.pop("data") or ()), *([traffic] if traffic else ())]
    if rest.pop("self_data") and files:
        raise ConfigError("--self takes no prompts: leave it out, or --data and --from-traffic")
    shares = items(rest.pop("mix"), float, "--mix")
    if len(shares) != 3:
        raise ConfigError(f"--mix must be three shares, got {len(shares)}", param="mix")
    init = _beginning(rest.pop("preset"), rest.pop("init"), {name: rest.pop(name) for name in _WIDTHS})
    settings = Settings(
        target=target,
        init=Init(shares_embedding=rest.pop("share_embedding"), **init),
        schedule=Schedule(**{name: rest.pop(name) for name in _SCHEDULE}),
        mixture=Mixture(*shares),
        temperatures=tuple(items(rest.pop("temperatures"), float, "--temperatures")),
        data=tuple(files),
        held_out=tuple(rest.pop("held_out") or ()),
        **rest,
    )
    Distillation(settings, engines).run()


def _beginning(preset: str | None, init: str | None, widths: dict[str, int | None]) -> dict[str, Any]:
    """The fields of `Init` that say how a draft begins."""
    if preset is None:
        return {"source": init or FIRST_CUT, **widths}
    if init is not None or any(width is not None for width in widths.values()):
        raise ConfigError("--preset takes no --init, --mlp, --kv-heads or --hidden: it sets them", param="preset")
    return {"source": f"preset:{preset}"}
