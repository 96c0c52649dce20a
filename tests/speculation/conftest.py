"""What tests of the model drafter share: small checkpoints, and worlds in which one of them drafts."""

import pytest

from quire.speculation.draft_cache import DraftLayout
from quire.speculation.model import ModelDrafter

from ..models.conftest import CPU, VOCAB, Tiny, make_checkpoint
from .world import World

SLOTS, LENGTH, PAGE = 4, 60, 4
MODELS = {
    "native": ("llama", {"num_key_value_heads": 2}),
    "window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "library": ("gpt_neox", {}),
}


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    """Checkpoints by name, made once."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp("draft"), *MODELS[name])
        return made[name]

    return get


def make_world(made: Tiny, capacity: int = SLOTS * LENGTH, length: int = LENGTH, place=CPU) -> World[ModelDrafter]:
    runner = made.load(place=place)
    drafter = ModelDrafter(runner, DraftLayout(SLOTS, length, PAGE, capacity), place, runner)
    return World(drafter, SLOTS, length, VOCAB)
