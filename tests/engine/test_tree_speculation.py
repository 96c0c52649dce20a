"""Steps that verify trees of draft tokens: whatever grows, the text is what it would be without."""

from typing import Any

import pytest

from .fake_model import POISON, FakeRunner
from .harness import Harness, Sequence, make_engine
from .scripted import BranchingDrafter
from .test_speculation import TOKENS, right, sometimes, wrong
from .test_step import PROMPT

VOCAB = POISON  # of what is proposed beside: smaller than the model's


def accepted(sequence: Sequence) -> list[int]:
    """Draft tokens that were right, of each step that had some."""
    return [len(output.token_ids) - 1 for output in sequence.outputs if output.drafted]


@pytest.mark.parametrize("drafter", [right, wrong, sometimes])
@pytest.mark.parametrize("windows", [(None, 6), (6, 3), (1, None, 5)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_greedy_text_is_the_same(drafter: Any, windows: tuple[int | None, ...], page_size: int) -> None:
    harness = Harness(make_engine(FakeRunner(windows), page_size=page_size), drop_windows=True)
    text = [*PROMPT, *harness.generate(harness.add(3, PROMPT), TOKENS + 12)]
    trees = BranchingDrafter(drafter(text), VOCAB)
    harness = Harness(make_engine(FakeRunner(windows), trees, page_size=page_size), True, drafts=9)
    sequence = harness.add(3, PROMPT)
    assert harness.generate(sequence, TOKENS, chunk=7) == text[len(PROMPT) :][:TOKENS]
    cache = harness.engine.cache
    assert cache.kept[3].flatten().tolist() == [sequence.kept[row] for row in range(harness.rows)]
    assert cache.computed[3] == len(sequence.tokens) - 1
    assert any(output.branched for output in sequence.outputs)
    assert drafter is not right or max(accepted(sequence)) >= 6
