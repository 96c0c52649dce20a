"""Prompt files in each form, and what is said of broken ones."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from quire.core.errors import ConfigError
from quire.core.request import SamplingParams
from quire.core.top_rows import pack_rows
from quire.distill.held_out import make_held_texts
from quire.distill.prompts import Example, hold_out, load_tokenizer, read_examples
from quire.distill.rounds import OPENING_TOKENS, SELF, Mixture, RowMaker, self_examples
from quire.distill.target_rows import Logged, Row

from .drafting import VOCAB, Parrot


@pytest.fixture(scope="module")
def fast(shipped: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(shipped))


def read(folder: Path, tokenizer: PreTrainedTokenizerBase, *lines: str) -> list[Example]:
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return read_examples(folder / "prompts.jsonl", tokenizer, VOCAB)


def test_all_forms(tmp_path: Path, fast: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = [
        {"prompt": "def f(x):", "completion": "\n    return x\n", "domain": "code"},
        {"messages": messages},
        {"prompt_ids": [5, 6, 7], "output_ids": [8]},
    ]
    lines.append({"messages": [*messages, {"role": "assistant", "content": "ho"}]})
    one, two, three, four = read(tmp_path, fast, *(json.dumps(line) for line in lines), "")
    assert fast.decode(list(one.prompt)) == "def f(x):" and fast.decode(list(one.output)) == "\n    return x\n"
    assert one.domain == "code" and two.domain == "text"
    assert fast.decode(list(two.prompt)) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert three == Example((5, 6, 7), (8,))
    assert four.prompt == two.prompt and fast.decode(list(four.output)) == "ho<|im_end|>\n"


def told(count: int, token: int = 5, best: float = 0.5) -> dict[str, Any]:
    """What a log has of `count` tokens."""
    row = pack_rows(np.array([[token, 9]], np.int64), np.log([[best, 0.25]]).astype(np.float32))[0]
    return {"version": 1, "top": 2, "rows": base64.b64encode(row * count).decode()}


def test_what_a_log_says_of_the_target(tmp_path: Path, fast: PreTrainedTokenizerBase) -> None:
    line = {"prompt_ids": [5, 6, 7], "output_ids": [8, 9], "target": told(2)}
    (one,) = read(tmp_path, fast, json.dumps(line))
    assert one.prompt == (5, 6, 7) and one.output == (8, 9) and one.logged is not None
    ids, logs = one.logged.distributions()
    assert ids.tolist() == [[5, 9]] * 2 and logs[1].exp().tolist() == pytest.approx([0.5, 0.25, 0.25], rel=2e-3)
    wrong: list[Any] = [{"top": 2}, [], None, told(1), told(2, token=VOCAB), told(2, best=1.2)]
    changes: list[dict[str, Any]] = [{"version": 2}, {"rows": "a"}, {"rows": 3}, {"top": 3}, {"top": -1}]
    for target in wrong + [told(2) | change for change in [*changes, {"top": 10**30}]]:
        with pytest.raises(ConfigError, match="line 1") as caught:
            read(tmp_path, fast, json.dumps(line | {"target": target}))
        assert "\n" not in caught.value.message


def test_logged_rows_begin_where_the_target_began() -> None:
    def row(prompt: int, output: int, uses_logged: bool = True) -> Row:
        ids = tuple(range(100, 100 + prompt + output))
        example = Example(ids[:prompt], ids[prompt:], logged=Logged(b"", 2) if output else None)
        (found,) = RowMaker([example], Mixture(1, 0, 0), 16, (1.0,), 0, "t", uses_logged).rows(0, 1, "", Parrot())
        return found

    short = row(5, 8)
    assert short.ids == list(range(100, 112)) and short.start == 4 and short.logged is not None
    assert row(5, 1).ids == list(range(100, 105)) and row(16, 1).start == 15
    long = row(5, 80)
    assert long.ids == list(range(100, 116)) and long.start == 4
    for other in (row(40, 1), row(14, 9), row(5, 0), row(5, 8, uses_logged=False)):
        assert other.logged is None and other.start == 0 and len(other.ids) in (5, 13, 16)


BROKEN = ["{", "[]", "{}", '{"prompt": 3}', '{"prompt": ""}', '{"prompt_ids": [8192]}', '{"prompt_ids": ["a"]}']
BROKEN += ['{"messages": []}', '{"messages": [{}]}', '{"messages": "hi"}', '{"messages": ["hi"]}']
BROKEN += ['{"prompt_ids": 5}', '{"prompt_ids": [true]}', '{"prompt": "x", "completion": 5}', "[" * 10**5]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, fast: PreTrainedTokenizerBase, line: str) -> None:
    with pytest.raises(ConfigError, match="line 2") as caught:
        read(tmp_path, fast, '{"prompt": "x"}', line)
    assert "\n" not in caught.value.message


def test_missing_and_empty_files(tmp_path: Path, fast: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_examples(tmp_path / "none.jsonl", fast, VOCAB)
    with pytest.raises(ConfigError, match="no prompts"):
        read(tmp_path, fast, "")


def test_equal_prompts_are_held_out_together() -> None:
    examples = [Example((n % 60, 1)) for n in range(300)]
    train, held = hold_out(examples)
    assert len(train) + len(held) == 300 and 0 < len(held) < 60
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    assert hold_out([Example((1,))]) == ([Example((1,))], [Example((1,))])


class Seeded(Parrot):
    """Draws by the seed of each request."""

    def generate(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        assert all(one.min_tokens == one.max_tokens and one.temperature == 1.0 for one in params)
        return [np.random.default_rng(one.seed).integers(0, VOCAB, one.max_tokens).tolist() for one in params]


@pytest.mark.parametrize("start", [7, None])
def test_texts_that_the_target_begins_itself_differ(start: int | None) -> None:
    drawn = self_examples(50, start, VOCAB, 0, "t", Seeded())
    assert len({example.prompt[1:] for example in drawn}) == 50 and {example.domain for example in drawn} == {SELF}
    assert {len(example.prompt) for example in drawn} == {1 + OPENING_TOKENS}
    assert {example.prompt[0] for example in drawn} == {7} if start else len({e.prompt[0] for e in drawn}) > 40
    assert drawn == self_examples(50, start, VOCAB, 0, "t", Seeded())


def test_where_no_text_is_known_its_share_is_the_targets() -> None:
    assert Mixture(0.25, 0.5, 0.25).unknown() == Mixture(0.0, 0.75, 0.25)


def test_rows_are_known_text_and_continuations_in_their_shares(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    long = Example(tuple(range(100, 140)), tuple(range(140, 160)))
    known = [row.ids for row in RowMaker([long], Mixture(1, 0, 0), 16, (1.0,), 0, "t").rows(0, 50, "d", Parrot())]
    assert all(row == list(range(row[0], row[0] + 16)) for row in known) and len({row[0] for row in known}) > 10
    maker = RowMaker([long], Mixture(0.5, 0.25, 0.25), 16, (1.0,), 0, str(tmp_path))
    rows = maker.rows(3, 200, str(tmp_path), Parrot())
    ids = [row.ids for row in rows]
    continued = [row for row in ids if row[:12] == list(range(128, 140)) and row[12:] == row[:4]]
    assert 70 < len(continued) < 130 and all(len(row) == 16 for row in ids)
    assert rows == maker.rows(3, 200, str(tmp_path), Parrot()) != maker.rows(4, 200, str(tmp_path), Parrot())
    shares = Mixture(1, 1, 2).draw(np.random.default_rng(0), 4000)
    assert 1800 < shares.count("draft") < 2200


class Asked(Parrot):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[list[int]], list[SamplingParams]]] = []

    def generate(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        self.calls.append((checkpoint, [list(prompt) for prompt in prompts], list(params)))
        return [[1] * (one.max_tokens or 0) for one in params]


def test_continuations_are_drawn_at_the_temperatures_and_by_seeds_of_their_own() -> None:
    engines, example = Asked(), Example(tuple(range(100, 105)))
    RowMaker([example], Mixture(0, 1, 1), 16, (0.5, 0.0), 0, "target").rows(0, 200, "draft", engines)
    assert [checkpoint for checkpoint, _, _ in engines.calls] == ["target", "draft"]
    params = [one for _, _, many in engines.calls for one in many]
    assert len({one.seed for one in params}) == len(params) == 200
    assert 60 < sum(one.temperature == 0.5 for one in params) < 140 and {p.temperature for p in params} == {0.5, 0.0}
    assert {one.max_tokens for one in params} == {11}


def test_held_out_texts_fit_with_their_answers(tmp_path: Path) -> None:
    engines, examples = Asked(), [Example(tuple(range(100, 140))), Example((5, 6), domain="short")]
    options = {"length": 16, "new_tokens": 6, "temperature": 0.7, "seed": 3}
    texts = make_held_texts(tmp_path / "held", examples, "target", engines, **options)  # type: ignore[arg-type]
    assert [text.prompt for text in texts] == [list(range(130, 140)), [5, 6]] and texts[1].domain == "short"
    ((_, prompts, params),) = engines.calls
    assert prompts[:2] == prompts[2:] and all(one.max_tokens == 6 for one in params)
    assert [one.temperature for one in params] == [0.7, 0.7, 0.0, 0.0] and params[0].seed != params[1].seed
    again = make_held_texts(tmp_path / "held", examples, "target", engines, **options)  # type: ignore[arg-type]
    assert again == texts and len(engines.calls) == 1
