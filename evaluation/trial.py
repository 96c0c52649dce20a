"""What a trial is, and what of an LLM and its answers the evaluation needs; `server.llm` fulfils it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.messages import EngineInfo, EngineStats, Logprob
from ..core.pruning import PruneParams
from ..core.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Trial:
    """One prompt and what is looked at in the output."""

    prompt: list[int]
    max_tokens: int
    answer: str = ""
    """What must be generated, if an answer is."""
    spans: tuple[tuple[int, int], ...] = ()
    """Positions [from, to) of the prompt that are scored, if any are."""

    @property
    def params(self) -> SamplingParams:
        """Greedy, of a set length; with the opinion of the prompt where that is what is scored."""
        wanted = 1 if self.spans else None
        return SamplingParams(temperature=0.0, max_tokens=self.max_tokens, ignore_eos=True, prompt_logprobs=wanted)


class Choice(Protocol):
    """One output."""

    @property
    def text(self) -> str:
        """The tokens as text."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """What was generated."""
        ...


class Completion(Protocol):
    """What a prompt gave."""

    @property
    def choices(self) -> Sequence[Choice]:
        """One here."""
        ...

    @property
    def prompt_logprobs(self) -> list[Logprob]:
        """From the second prompt token on, if asked for."""
        ...


class Model(Protocol):
    """A model that completes prompts."""

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counters of the engine."""
        ...

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        *,
        prune: PruneParams | None = None,
        progress: bool = True,
    ) -> Sequence[Completion]:
        """Complete the prompts."""
        ...
