"""The shipped checkpoint keeps what its card says: it recalls a value bound 1,000 tokens earlier."""

from pathlib import Path

import numpy as np
import pytest

from quire.distill.corpus import Corpus
from quire.distill.recall import KEYS, RecallTrials, transformers_logits
from quire.distill.samples import SampleMaker

TRIALS = 30
FLOOR = 0.8  # the card measures more; thirty trials of 0.95 fall below this once in a thousand


@pytest.mark.parametrize("keys", [1, KEYS])
def test_recall_at_distance_1000(shipped: Path, corpus: Corpus, maker: SampleMaker, keys: int) -> None:
    trials = RecallTrials(corpus, maker, seed=7)
    rng = np.random.default_rng(7)
    made = [trials.recall_trial(rng, 1000, keys) for _ in range(TRIALS)]
    assert trials.exact(transformers_logits(shipped, "cpu"), made, whole=True) >= FLOOR
