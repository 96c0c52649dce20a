"""What presets come to: the share of the target that they promise, or as near to it as two layers allow."""

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from quire.core.config import embedded_model
from quire.core.errors import ConfigError
from quire.distill.draft_init import Init, make_draft
from quire.distill.importance import decoder_layers
from quire.distill.presets import SHARES, from_preset

from .drafting import tiny_target


def share(draft: PreTrainedModel, target: PreTrainedModel) -> float:
    """Of the target's weights in layers."""
    sizes = [sum(p.numel() for p in decoder_layers(model).parameters()) for model in (draft, target)]
    return sizes[0] / sizes[1]


@pytest.mark.parametrize(("layers", "tiny", "small"), [(20, "layers:2", "layers:4"), (32, "layers:3", "layers:6")])
def test_depth_goes_first(layers: int, tiny: str, small: str) -> None:
    target = tiny_target(layers)
    for name, source in (("tiny", tiny), ("small", small)):
        init = from_preset(Init(f"preset:{name}", shares_embedding=True), target)
        assert init == Init(source, None, True)
        drafted = share(make_draft(Init(source.replace("layers", "random")), target, []), target)
        assert drafted == pytest.approx(SHARES[name], rel=0.1)  # type: ignore[index]


def test_two_layers_stay_and_are_narrowed() -> None:
    target = AutoModelForCausalLM.from_pretrained(embedded_model())
    init = from_preset(Init("preset:small"), target)
    assert init.source == "layers:2" and init.mlp == 256, "a quarter is left"
    wide = from_preset(Init("preset:small"), tiny_target(9))
    assert wide.source == "layers:2" and wide.mlp is not None
    draft = make_draft(Init("random:2", wide.mlp), tiny_target(9), [])
    assert share(draft, tiny_target(9)) <= 0.2


def test_what_is_no_preset() -> None:
    target = tiny_target()
    assert from_preset(Init("layers:1", 8), target) == Init("layers:1", 8)
    assert Init("preset:tiny").is_cut, "no folder"
    with pytest.raises(ConfigError, match="tiny, small, got 'huge'"):
        from_preset(Init("preset:huge"), target)
