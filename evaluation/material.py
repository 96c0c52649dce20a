"""What trials are made of: filler text, names and values, all as tokens of the model's own tokenizer.

Code is the held-out part of the standard library's sources (what the embedded model never saw); prose is the
documentation inside them. Both are there wherever Python is, so that nothing has to be fetched.
"""

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, Protocol

import numpy as np

from ..core.errors import InvalidRequestError
from ..distill.corpus import common_words, is_held_out, standard_library

TextFormat = Literal["code", "prose"]
VALUE_DIGITS = 5


class TokenizerLike(Protocol):
    """What is needed of a tokenizer; `server.text.Tokenizer` fulfils it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Fact:
    """A line that binds a name to a value, split where the value begins."""

    value: str
    head: list[int]
    """Tokens up to the value: what asks for it again."""
    answer: list[int]
    """Tokens of the value, without what ends the line."""
    end: list[int]

    @property
    def line(self) -> list[int]:
        """The whole line as tokens."""
        return self.head + self.answer + self.end


class Material:
    """Filler and facts in one format, for one tokenizer; holds no random state."""

    def __init__(self, tokenizer: TokenizerLike, text_format: TextFormat) -> None:
        self.tokenizer = tokenizer
        self.format: TextFormat = text_format
        self.text = _code() if text_format == "code" else _prose()
        self.opening = tokenizer.encode("")
        """Tokens that begin every prompt, such as BOS; often none."""

    @cached_property
    def ids(self) -> np.ndarray:
        """int64 [N], the whole filler text."""
        return np.array(self.tokens(self.text), dtype=np.int64)

    @cached_property
    def line_starts(self) -> np.ndarray:
        """int64: positions in `ids` at which a line begins."""
        texts = {int(token): self.tokenizer.decode([int(token)]) for token in np.unique(self.ids)}
        ends = np.array([texts[int(token)].endswith("\n") for token in self.ids])
        starts = np.array([texts[int(token)].startswith("\n") for token in self.ids])
        return np.flatnonzero(ends[:-1] & ~starts[1:]) + 1

    @cached_property
    def words(self) -> list[str]:
        """Frequent words, for names."""
        return common_words(iter([self.text]), 400)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a piece of text that stands inside a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def filler(self, rng: np.random.Generator, length: int) -> "Filler":
        """`length` tokens from a random line on. Raises `InvalidRequestError` if there is not so much text."""
        starts = self.line_starts[self.line_starts + length <= len(self.ids)]
        if not len(starts):
            raise InvalidRequestError(f"{length:,} tokens of {self.format} are wanted, there are {len(self.ids):,}")
        first = int(starts[rng.integers(len(starts))])
        inside = self.line_starts[(self.line_starts > first) & (self.line_starts < first + length)]
        return Filler(self.ids[first : first + length].tolist(), inside - first)

    def names(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different names, none of them in the filler and none the beginning of another."""
        names: list[str] = []
        while len(names) < count:
            first, second = (self.words[int(i)] for i in rng.integers(len(self.words), size=2))
            name = f"{first}_{second}_{rng.integers(10, 100)}" if self.format == "code" else f"{first} {second}"
            if name not in self.text and not any(name.startswith(n) or n.startswith(name) for n in names):
                names.append(name)
        return names

    def values(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different numbers of five digits that stand nowhere in the filler."""
        values: list[str] = []
        while len(values) < count:
            value = str(rng.integers(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS))
            if value not in values and value not in self.text:
                values.append(value)
        return values

    def fact(self, name: str, value: str) -> Fact:
        """The line that says that `name` is `value`."""
        if self.format == "code":
            return self._split(name, value, f"{name} =", f"{name} = {value}\n")
        head = f"The special number for {name} is"
        return self._split(name, value, head, f"{head} {value}.\n")

    def facts(self, rng: np.random.Generator, count: int) -> list[Fact]:
        """Facts of different names and values."""
        pairs = zip(self.names(rng, count), self.values(rng, count), strict=True)
        return [self.fact(name, value) for name, value in pairs]

    def sum_fact(self, first: int, second: int) -> Fact:
        """The line that says what two numbers make together."""
        name, total = f"{first} + {second}", str(first + second)
        if self.format == "code":
            return self._split(name, total, f"assert {name} ==", f"assert {name} == {total}\n")
        return self._split(name, total, f"{name} =", f"{name} = {total}\n")

    def _split(self, name: str, value: str, head: str, line: str) -> Fact:
        """Where the tokenizer joins head and value, the head ends before the joint."""
        whole, alone = self.tokens(line), self.tokens(head)
        joint = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
        ends = range(joint + 1, len(whole))
        end = next((end for end in ends if value in self.tokenizer.decode(whole[joint:end])), len(whole))
        return Fact(value, whole[:joint], whole[joint:end], whole[end:])


@dataclass(frozen=True, slots=True)
class Filler:
    """Text without meaning for the task, into which lines are put."""

    ids: list[int]
    line_starts: np.ndarray
    """Where a line may be put, ascending."""

    def insert(self, lines: Sequence[tuple[float, list[int]]]) -> list[int]:
        """The text with each line at the line start nearest to its depth, 0 (the front) to 1 (the end)."""
        places = [0, *self.line_starts.tolist(), len(self.ids)]
        spots = [min(places, key=lambda place: abs(place - depth * len(self.ids))) for depth, _ in lines]
        out: list[int] = []
        done = 0
        for spot, (_, line) in sorted(zip(spots, lines, strict=True), key=lambda pair: (pair[0], pair[1][0])):
            out += self.ids[done:spot] + line
            done = spot
        return out + self.ids[done:]


@cache
def _code() -> str:
    return "\n".join(file.text for file in standard_library() if is_held_out(file.path))


@cache
def _prose() -> str:
    """The documentation of modules, classes and functions, a paragraph a line."""
    found: dict[str, None] = {}
    for file in standard_library():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings
                tree = ast.parse(file.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
                for paragraph in doc.split("\n\n"):
                    line = re.sub(r"\s+", " ", paragraph).strip()
                    if len(line) > 80 and line[0].isupper() and line.endswith("."):
                        found[line] = None
    return "".join(f"{line}\n" for line in found)
