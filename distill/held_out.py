"""Held-out texts: prompts the draft is not trained on, continued by the target once and then measured on."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from ..core.request import SamplingParams
from .acceptance import Tally, chain_tally, greedy_matches, sampled_tally
from .prompts import Example
from .rounds import Engines
from .stored import reading
from .target_rows import Logits


class HeldText(msgspec.Struct, frozen=True):
    """One held-out prompt and what the target said after it."""

    domain: str
    prompt: list[int]
    sampled: list[int]
    """At the temperature of the distillation."""
    greedy: list[int]


class Measured(msgspec.Struct, frozen=True):
    """What `measure` found, by domain and over all."""

    acceptance: dict[str, float]
    """1 - total variation distance, over the sampled text."""
    agreement: dict[str, float]
    """Share of positions of the sampled text where both hold the same token most likely."""
    accepted_length: dict[str, float]
    """Mean accepted draft tokens of a greedy step with `most` drafts; the tokens of a step are one more."""
    by_position: dict[str, list[float]]
    """Greedy acceptance of draft token number i, given that those before it were accepted."""
    most: int


ALL = "all"


def choose(examples: Sequence[Example], count: int) -> list[Example]:
    """Up to `count` examples, the domains in turn."""
    by_domain: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_domain[example.domain].append(example)
    turns = max(len(group) for group in by_domain.values())
    mixed = [group[turn] for turn in range(turns) for group in by_domain.values() if turn < len(group)]
    return mixed[:count]


def make_held_texts(
    path: Path,
    examples: Sequence[Example],
    target: str,
    engines: Engines,
    *,
    length: int,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> list[HeldText]:
    """The texts stored at `path`, made there if they are missing.

    Prompts are cut to fit `length` with their answer, which is half of it at most.
    """
    if path.exists():
        with reading(path):
            return msgspec.json.decode(path.read_bytes(), type=list[HeldText])
    new_tokens = min(new_tokens, length // 2)
    prompts = [list(example.prompt[-max(1, length - new_tokens) :]) for example in examples]
    sampled = [
        SamplingParams(temperature=temperature, max_tokens=new_tokens, seed=seed + index)
        for index in range(len(prompts))
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    answers = engines.generate(target, prompts * 2, sampled + [greedy] * len(prompts))
    half = len(prompts)
    texts = [
        HeldText(example.domain, prompt, answers[index], answers[half + index])
        for index, (example, prompt) in enumerate(zip(examples, prompts, strict=True))
    ]
    path.with_suffix(".new").write_bytes(msgspec.json.encode(texts))
    os.replace(path.with_suffix(".new"), path)
    return texts


def measure(
    texts: Sequence[HeldText], target: Logits, draft: Logits, *, most: int, temperature: float, device: torch.device
) -> Measured:
    """Acceptance of the draft on the texts, with up to `most` draft tokens a step."""
    tallies: dict[str, Tally] = {ALL: Tally()}
    for text in texts:
        one = sampled_tally(target, draft, text.prompt + text.sampled, temperature, device)
        one += chain_tally(greedy_matches(draft, text.prompt, text.greedy, device), most)
        tallies[ALL] += one
        tallies.setdefault(text.domain, Tally())
        tallies[text.domain] += one
    return Measured(
        acceptance={name: tally.acceptance for name, tally in tallies.items()},
        agreement={name: tally.agreement for name, tally in tallies.items()},
        accepted_length={name: tally.accepted_length for name, tally in tallies.items()},
        by_position={name: tally.by_position for name, tally in tallies.items()},
        most=most,
    )
