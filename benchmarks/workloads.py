"""Prompts that differ in how well what follows can be drafted; all text was held out when quire-mini was trained.

code: the next lines of a source file. edit: a source with one name changed throughout, most of which stands in the
prompt. chat: the second question of a conversation, through the model's template.
"""

import itertools
import keyword
import re
from collections import Counter

import numpy as np

from quire.core.errors import InvalidRequestError
from quire.core.ids import RequestId
from quire.core.request import Request, SamplingParams, SeedSource
from quire.distill.corpus import documented_functions, is_held_out, standard_library
from quire.evaluation.material import Material
from quire.server.text import Tokenizer

WORKLOADS = ("code", "edit", "chat")
GIVEN_LINES = 3
"""Of the edited source: by then it can be seen what is asked for."""
_IDENTIFIER = re.compile(r"\b[A-Za-z_]\w{3,}\b")
_names = itertools.count()


class Workloads:
    """Draws prompts; the same ones for the same seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self._tokenizer = tokenizer
        self._material = Material(tokenizer, "code")
        self._chats = documented_functions([file for file in standard_library() if is_held_out(file.path)])
        self._rng = np.random.default_rng(seed)

    def take(self, kind: str, length: int) -> list[int]:
        """Tokens of a prompt of `WORKLOADS`: `length` of code, about as many of an edit, what comes of a chat.

        Raises `InvalidRequestError` for a chat if the model has no template.
        """
        if kind == "chat":
            return self._chat()
        if kind == "edit":
            return self._edit(length)
        return self._material.opening + self._material.filler(self._rng, length).ids

    def _edit(self, length: int) -> list[int]:
        source = ""
        while not (names := names_in(source)):
            source = self._tokenizer.decode(self._material.filler(self._rng, length).ids)
        old, (new,) = names[0], self._material.names(self._rng, 1)
        return self._tokenizer.encode(edit_prompt(source, old, new))

    def _chat(self) -> list[int]:
        (first, answer), (second, _) = (self._chats[i] for i in self._rng.choice(len(self._chats), 2, replace=False))
        said = (("user", first), ("assistant", answer), ("user", second))
        text = self._tokenizer.chat_prompt([{"role": role, "content": content} for role, content in said])
        return self._tokenizer.encode(text, add_special_tokens=False)


def names_in(source: str) -> list[str]:
    """Names that come at least three times, the most frequent one first."""
    found = Counter(name for name in _IDENTIFIER.findall(source) if not keyword.iskeyword(name))
    return [name for name, times in found.most_common() if times >= 3]


def edit_prompt(source: str, old: str, new: str) -> str:
    """A source, what is to be done, and the beginning of the answer."""
    edited = re.sub(rf"\b{old}\b", new, source)
    given = "".join(edited.splitlines(keepends=True)[:GIVEN_LINES])
    return f"{source}\n\n# The same with {old} renamed to {new}:\n\n{given}"


def has_chat(tokenizer: Tokenizer) -> bool:
    """Whether the model has a chat template that takes a conversation."""
    try:
        tokenizer.chat_prompt([{"role": "user", "content": "?"}])
    except InvalidRequestError:
        return False
    return True


def request(prompt: list[int], output: int, temperature: float, seeds: SeedSource) -> Request:
    """Of a set length and without a seed of its own, under a fresh name."""
    params = SamplingParams(temperature=temperature, max_tokens=output, ignore_eos=True)
    return Request.create(RequestId(f"benchmark-{next(_names)}"), prompt, params, seeds)
