"""The wired initialisation looks back before any training, and training cannot touch the circuit."""

import numpy as np
import pytest
import torch

from quire.distill.corpus import Corpus
from quire.distill.network import Decoder, Shape
from quire.distill.optimizer import MaskedMuon, Rates, orthogonalize
from quire.distill.recall import RecallTrials
from quire.distill.samples import SampleMaker
from quire.distill.wiring import Layout, trainable_masks, wire

SHAPE = Shape(layers=2, hidden=256, mlp=64)  # the circuit needs two layers and no feed-forward


@pytest.fixture(scope="module")
def wired() -> Decoder:
    model = Decoder(SHAPE)
    wire(model, Layout())
    return model


def test_untrained_model_copies_random_tokens_far_back(wired: Decoder) -> None:
    block = torch.randint(3, SHAPE.vocab_size, (1, 2000), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([block, block[:, :100]], dim=1)
    with torch.inference_mode():
        best = wired(ids, torch.bfloat16)[0, 2003:-1].argmax(-1)
    assert (best == ids[0, 2004:]).float().mean() > 0.9


@pytest.mark.parametrize(("distance", "keys"), [(300, 1), (300, 8), (1000, 8)])
def test_untrained_model_recalls_far_above_chance(
    wired: Decoder, corpus: Corpus, maker: SampleMaker, distance: int, keys: int
) -> None:
    trials = RecallTrials(corpus, maker)
    made = [trials.recall_trial(np.random.default_rng(seed), distance, keys) for seed in range(10)]
    assert trials.exact(wired.last_logits, made, whole=True) >= 0.7  # chance is below 1 in 1,000


def test_training_leaves_the_circuit_bit_for_bit(maker: SampleMaker) -> None:
    model = Decoder(SHAPE)
    wire(model, Layout())
    masks = trainable_masks(model, Layout())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MaskedMuon(model, masks, Rates())
    ids = torch.randint(3, SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model.loss(ids, torch.ones(2, 32)).backward()
        optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        if name in masks:
            assert not moved[masks[name] == 0].any(), name
    assert (model.embed_tokens.weight != before["embed_tokens.weight"]).any()


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrices = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert values.min() > 0.4 and values.max() < 1.4  # the quintic iteration's own spread, about 0.7 to 1.2
