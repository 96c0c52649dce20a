"""Training rows: windows of code, with bindings to recall, blocks to copy, and chats.

A row is a pure function of (seed, index), so a resumed run sees what an unbroken one would have seen. Weights say how
much predicting a token counts: what cannot be known (a random name or value where it first appears) counts nothing,
a value that stands further up counts several times.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from .corpus import Corpus
from .vocabulary import TURN_END, TURN_START

VALUE_WEIGHT = 3.0
GOLDEN_RATIO = 0.6180339887498949  # steps of this share of the corpus visit it evenly, however many


@dataclass(slots=True)
class Piece:
    """Tokens with the weight of predicting each of them; `value` marks the positions of a recalled value."""

    ids: list[int]
    weights: list[float]
    value: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Binding:
    """A line `name = value` as tokens: the head `name =` and the value (without a closing newline token)."""

    head: list[int]
    value: list[int]
    end: list[int]  # the newline, unless the value's last token includes it

    def first(self) -> Piece:
        """The line where it is bound: nothing but the line's form can be known."""
        name = [0.0] * (len(self.head) - 1) + [0.5]
        return Piece(self.head + self.value + self.end, name + [0.0] * len(self.value) + [0.5] * len(self.end))

    def asked(self) -> Piece:
        """The line where it is asked for: the value is what counts, the name's later tokens a little."""
        name = [0.0] + [0.5] * (len(self.head) - 1)
        weights = name + [VALUE_WEIGHT] * len(self.value) + [1.0] * len(self.end)
        start = len(self.head)
        return Piece(self.head + self.value + self.end, weights, list(range(start, start + len(self.value))))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the row kinds; the rest is plain code."""

    recall: float
    copy: float
    random_copy: float
    chat: float


class SampleMaker:
    """Makes rows from a corpus; holds no state but the corpus."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.seed = seed
        self.end: int = corpus.end
        self.newline = tokenizer.encode("\n").ids

    def row(self, index: int, length: int, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
        """Row number `index`: ids [length + 1] int64 and the weights [length] float32 of predicting ids[1:]."""
        rng = np.random.default_rng((self.seed, index))
        makers: list[tuple[float, Callable[[np.random.Generator, int, int], Piece]]] = [
            (mixture.recall, self.recall_row),
            (mixture.copy, self.copy_row),
            (mixture.random_copy, self.random_copy_row),
            (mixture.chat, self.chat_row),
        ]
        draw = rng.random()
        maker: Callable[[np.random.Generator, int, int], Piece] = self.code_row
        for share, candidate in makers:
            if draw < share:
                maker = candidate
                break
            draw -= share
        piece = maker(rng, index, length + 1)
        ids = np.array(piece.ids[: length + 1], dtype=np.int64)
        return ids, np.array(piece.weights[1 : length + 1], dtype=np.float32)

    def window(self, index: int, length: int) -> list[int]:
        """`length` tokens of training code; successive indices spread evenly over the corpus."""
        span = max(1, len(self.corpus.train) - length)
        start = int((index * GOLDEN_RATIO % 1.0) * span)
        window = self.corpus.train[start : start + length].tolist()
        return window + [self.end] * (length - len(window))

    def code_row(self, rng: np.random.Generator, index: int, length: int) -> Piece:
        """Plain code."""
        return Piece(self.window(index, length), [1.0] * length)

    # --- recall -----------------------------------------------------------------------------------------------

    def word(self, rng: np.random.Generator) -> str:
        """One random word."""
        return self.corpus.words[int(rng.integers(len(self.corpus.words)))]

    def name(self, rng: np.random.Generator) -> str:
        """A random name in one of the styles code uses."""
        first, second, number = self.word(rng), self.word(rng), int(rng.integers(10, 100))
        styles = (
            f"{first}_{second}",
            f"{first}_{second}_{number}",
            f"{first}{second.capitalize()}",
            f"{first.upper()}_{second.upper()}",
            f"self.{first}_{second}",
            f"{first}.{second}_{number}",
        )
        return styles[int(rng.integers(len(styles)))]

    def value(self, rng: np.random.Generator) -> str:
        """A random short value: a number, a quoted word, a name."""
        first, second = self.word(rng), self.word(rng)
        styles = (
            str(int(rng.integers(0, 10 ** int(rng.integers(1, 4))))),
            str(int(rng.integers(100, 1000))),
            f'"{first}"',
            f"'{first}'",
            first,
            f"{first}_{second}",
            f"{first}.{second}",
        )
        return styles[int(rng.integers(len(styles)))]

    def binding(self, name: str, value: str, indent: str = "") -> Binding:
        """Tokens of a binding; the pattern never joins `=` with what follows, so head and value split cleanly."""
        head = self.tokenizer.encode(f"{indent}{name} =").ids
        rest = self.tokenizer.encode(f" {value}\n").ids
        if rest[-len(self.newline) :] == self.newline:
            return Binding(head, rest[: -len(self.newline)], self.newline)
        return Binding(head, rest, [])

    def bindings(self, rng: np.random.Generator, count: int) -> list[Binding]:
        """Bindings of different names, at one random indentation."""
        indent = " " * (4 * int(rng.integers(3))) if rng.random() < 0.5 else ""
        names: set[str] = set()
        while len(names) < count:
            names.add(self.name(rng))
        return [self.binding(name, self.value(rng), indent) for name in sorted(names, key=lambda _: rng.random())]

    def line_starts(self, ids: list[int]) -> np.ndarray:
        """Positions in `ids` where a line begins, so that a whole line may be put in."""
        array = np.array(ids)
        after = self.corpus.ends_line[array[:-1]] & ~self.corpus.starts_line_end[array[1:]]
        return np.flatnonzero(after) + 1

    def recall_row(self, rng: np.random.Generator, index: int, length: int) -> Piece:
        """Code with bindings early and questions for them later, in another order and at all distances."""
        count = int(rng.integers(1, 3 + length // 64))
        bound = self.bindings(rng, min(count, 24))
        code = self.window(index, length)
        inserts: list[tuple[int, Piece]] = []
        together = rng.random() < 0.3
        base = int(rng.integers(0, length // 3))
        room = length - 2 * sum(len(b.head) + len(b.value) + 1 for b in bound)
        for binding in bound:
            place = base if together else int(rng.integers(0, max(1, int(0.7 * room))))
            reach = max(room - place, 2)
            distance = int(np.exp(rng.uniform(0.0, np.log(reach))))
            inserts += [(place, binding.first()), (place + distance, binding.asked())]
        return self.insert(code, inserts, length)

    def insert(self, code: list[int], inserts: list[tuple[int, Piece]], length: int) -> Piece:
        """Put lines into code, each at the first line start from its place on; stable in the order of places."""
        starts = self.line_starts(code)
        out = Piece([], [])
        position = 0
        for place, piece in sorted(inserts, key=lambda item: item[0]):
            later = starts[starts >= max(place, position)]
            cut = int(later[0]) if len(later) else position
            extend(out, Piece(code[position:cut], [1.0] * (cut - position)))
            extend(out, piece)
            position = cut
        extend(out, Piece(code[position:], [1.0] * (len(code) - position)))
        return Piece(out.ids[:length], out.weights[:length], [v for v in out.value if v < length])

    # --- copying ----------------------------------------------------------------------------------------------

    def copy_row(self, rng: np.random.Generator, index: int, length: int) -> Piece:
        """Code in which a block of earlier lines comes again, word for word."""
        code = self.window(index, length)
        starts = self.line_starts(code)
        starts = starts[starts < length // 2]
        if len(starts) < 2:
            return self.code_row(rng, index, length)
        first = int(starts[rng.integers(len(starts))])
        block = code[first : first + int(rng.integers(16, max(17, length // 4)))]
        weights = [0.0] + [1.5] * (len(block) - 1)
        place = int(rng.integers(first + len(block), length))
        return self.insert(code, [(place, Piece(block, weights))], length)

    def random_copy_row(self, rng: np.random.Generator, index: int, length: int) -> Piece:
        """Random tokens, code, and the same random tokens again."""
        count = int(rng.integers(8, max(9, length // 4)))
        tokens = rng.integers(3, len(self.corpus.ends_line), count).tolist()
        code = self.window(index, int(rng.integers(0, length - 2 * count + 1)))
        out = Piece(list(tokens), [0.0] * count)
        extend(out, Piece(code, [1.0] * len(code)))
        extend(out, Piece(tokens, [0.0] * min(2, count) + [1.0] * (count - 2)))
        rest = self.window(index + 1, max(0, length - len(out.ids)))
        extend(out, Piece(rest, [1.0] * len(rest)))
        return out

    # --- chat -------------------------------------------------------------------------------------------------

    def chat_row(self, rng: np.random.Generator, index: int, length: int) -> Piece:
        """Chats one after another: questions about bindings, and functions asked for by their docstring."""
        out = Piece([], [])
        while len(out.ids) < length:
            question, answer = self.chat(rng)
            extend(out, self.chat_piece(question, answer))
        return Piece(out.ids[:length], out.weights[:length])

    def chat(self, rng: np.random.Generator) -> tuple[str, str]:
        """One question and its answer."""
        functions = self.corpus.functions
        if functions and rng.random() < 0.6:
            return functions[int(rng.integers(len(functions)))]
        names = [self.name(rng) for _ in range(int(rng.integers(1, 6)))]
        lines = [f"{name} = {self.value(rng)}" for name in names]
        chosen = int(rng.integers(len(names)))
        question = "\n".join(lines) + f"\nWhat is {names[chosen]}?"
        return question, lines[chosen]

    def chat_piece(self, question: str, answer: str) -> Piece:
        """One chat in the template's form, closed by <|endoftext|>; the answer counts fully."""
        asked, told = self.chat_ids(question, answer)
        return Piece(asked + told, [0.3] * len(asked) + [1.0] * len(told))

    def chat_ids(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the question, up to where the assistant speaks, and of the answer, <|endoftext|> included."""
        asked = self.tokenizer.encode(f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n").ids
        told = self.tokenizer.encode(f"{answer}{TURN_END}\n").ids
        return asked, [*told, self.end]


def extend(out: Piece, piece: Piece) -> None:
    """Append `piece` to `out` in place."""
    offset = len(out.ids)
    out.ids += piece.ids
    out.weights += piece.weights
    out.value += [offset + position for position in piece.value]
