"""What a draft keeps of its target, and the checkpoint that it becomes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from quire.core.errors import ConfigError, ModelLoadError
from quire.distill.draft_export import export_draft
from quire.distill.draft_init import Init, make_draft, most_important
from quire.distill.importance import channel_importance, decoder_layers, layer_importance
from quire.models.checkpoint import open_checkpoint
from quire.models.native import SHARES_EMBEDDING

from ..models.conftest import load
from ..models.dense_context import check_parity
from .drafting import VOCAB, tiny_target

ROWS = [torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=ROWS[0], use_cache=False).logits
    return out


@pytest.fixture
def target() -> PreTrainedModel:
    """Layer 1 changes nothing; in layer 2 only the even neurons do anything."""
    model = tiny_target()
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    for layer in (0, 2):
        model.model.layers[layer].mlp.down_proj.weight[:, 1::2] = 0.0
    return model


def test_a_layer_that_changes_nothing_has_no_influence(target: PreTrainedModel) -> None:
    importance = layer_importance(target, ROWS)
    assert importance[1] == pytest.approx(0.0, abs=1e-5)
    assert min(importance[0], importance[2]) > 0.01
    assert most_important(importance, 2) == [0, 2]
    assert most_important([0.1, 0.9, 0.5, 0.9], 3) == [1, 2, 3]


@pytest.mark.parametrize("source", ["layers:2", "layers:0,2"])
def test_dropping_what_does_nothing_changes_nothing(target: PreTrainedModel, source: str) -> None:
    draft = make_draft(Init(source, 12, True), target, ROWS)
    assert draft.config.num_hidden_layers == 2 and draft.model.layers[0].mlp.up_proj.weight.shape == (12, 32)
    assert torch.allclose(logits(draft), logits(target), atol=1e-5)
    frozen = {name for name, parameter in draft.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_dropping_heads_that_do_nothing_changes_nothing(tmp_path: Path, kind: str) -> None:
    """In layer 0 the middle one of three groups of two query heads says nothing, in layer 1 the first."""
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3}
    options = sizes | {"num_hidden_layers": 2, "vocab_size": VOCAB, "head_dim": 8, "tie_word_embeddings": True}
    config = getattr(transformers, kind).config_class(**options)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float(name.endswith("norm.weight")), 0.2)
        for layer, group in ((0, 1), (1, 0)):
            model.model.layers[layer].self_attn.o_proj.weight[:, 16 * group : 16 * (group + 1)] = 0.0
    draft = make_draft(Init("layers:0,1", None, False, kv_heads=2), model, ROWS)
    assert draft.model.layers[0].self_attn.k_proj.weight.shape == (16, 24)
    assert torch.allclose(logits(draft), logits(model), atol=1e-5)
    export_draft(draft, tmp_path / "draft", torch.float32, complete=True)
    runner = load(tmp_path / "draft", "native")
    assert (runner.spec.num_heads, runner.spec.num_kv_heads, runner.spec.head_dim) == (4, 2, 8)
    check_parity(runner, draft, VOCAB)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_dropping_channels_that_carry_nothing_changes_nothing(tmp_path: Path, kind: str, tied: bool) -> None:
    """Nobody writes into every third channel of the hidden state."""
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = sizes | {"num_hidden_layers": 2, "vocab_size": VOCAB, "head_dim": 8, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**options, rms_norm_eps=1e-12)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float(name.endswith("norm.weight")), 0.2)
        model.model.embed_tokens.weight[:, 1::3] = 0.0
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[1::3] = 0.0
    draft = make_draft(Init("layers:0,1", None, False, hidden=16), model, ROWS)
    assert draft.model.embed_tokens.weight.shape == (VOCAB, 16) and draft.lm_head.weight.shape == (VOCAB, 16)
    assert torch.allclose(logits(draft), logits(model), atol=1e-5)
    export_draft(draft, tmp_path / "draft", torch.float32, complete=True)
    runner = load(tmp_path / "draft", "native")
    assert (runner.spec.num_heads, runner.spec.head_dim) == (4, 8)
    check_parity(runner, draft, VOCAB)


def test_a_channel_counts_where_one_layer_lives_on_it() -> None:
    """Layer 0's norms shout on the first 24 channels, those behind it whisper on the last 8; layer 2 is not kept."""
    model = tiny_target()
    with torch.no_grad():
        for number, layer in enumerate(decoder_layers(model)):
            for norm in (layer.get_submodule("input_layernorm"), layer.get_submodule("post_attention_layernorm")):
                norm.get_parameter("weight")[:24] = 10.0 if number == 0 else 0.0
                norm.get_parameter("weight")[24:] = 0.0 if number == 0 else 0.1
        model.model.norm.weight[:24] = 5.0
        model.model.norm.weight[24:] = 0.0
    layers = decoder_layers(model)
    whispering = channel_importance(model, ROWS, [layers[0], layers[1]])[24:]
    assert whispering.sum() == pytest.approx(1.0, abs=0.3), "whole shares of what layer 1's norms hand out"
    assert channel_importance(model, ROWS, [layers[0]])[24:].max() == 0.0


def test_all_widths_are_cut_together(target: PreTrainedModel) -> None:
    """Of a target where the rest of neither neurons nor channels does anything."""
    with torch.no_grad():
        target.model.embed_tokens.weight[:, 20:] = 0.0
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight[20:] = 0.0
            layer.mlp.down_proj.weight[20:] = 0.0
    draft = make_draft(Init("layers:2", mlp=12, shares_embedding=False, hidden=20), target, ROWS)
    assert draft.model.layers[1].mlp.down_proj.weight.shape == (20, 12)
    assert torch.allclose(logits(draft), logits(target), atol=1e-3), "but for the norms' epsilon"
    fresh = make_draft(Init("random:2", mlp=12, shares_embedding=False, hidden=20), target, ROWS)
    assert fresh.model.layers[1].mlp.down_proj.weight.shape == (20, 12)


def test_a_draft_of_its_own_is_a_plain_checkpoint(tmp_path: Path, target: PreTrainedModel) -> None:
    draft = make_draft(Init("layers:0,2", None, False), target, ROWS)
    assert all(parameter.requires_grad for parameter in draft.parameters())
    export_draft(draft, tmp_path / "draft", torch.float32, complete=False)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(draft))
    with torch.no_grad():
        loaded.model.embed_tokens.weight.add_(1.0)
    loaded.save_pretrained(tmp_path / "other")
    again = make_draft(Init(str(tmp_path / "other")), target, [])
    assert torch.equal(logits(again), logits(loaded)), "what has an embedding of its own keeps it"
    shared = make_draft(Init(str(tmp_path / "other"), None, True), target, [])
    assert torch.equal(shared.model.embed_tokens.weight, target.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_sharing_draft_stores_neither_embedding_nor_head(tmp_path: Path, tied: bool) -> None:
    target = tiny_target(tied=tied)
    draft = make_draft(Init("layers:1", None, True), target, ROWS)
    export_draft(draft, tmp_path / "draft", torch.bfloat16, complete=False)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config[SHARES_EMBEDDING] is True and config["dtype"] == "bfloat16"
    assert (tmp_path / "draft" / "model.safetensors").stat().st_size < 2 * 32 * VOCAB
    again = make_draft(Init(str(tmp_path / "draft")), target, [])
    assert torch.allclose(logits(again), logits(draft), atol=0.05)
    export_draft(draft, tmp_path / "whole", torch.float32, complete=True)
    own = make_draft(Init(str(tmp_path / "draft"), None, False), target, [])
    assert all(parameter.requires_grad for parameter in own.parameters())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    assert torch.equal(logits(whole), logits(draft))
    assert SHARES_EMBEDDING not in json.loads((tmp_path / "whole" / "config.json").read_text())


def test_random_layers_under_the_targets_embedding(target: PreTrainedModel) -> None:
    draft = make_draft(Init("random:1", None, True), target, ROWS)
    assert torch.equal(draft.model.embed_tokens.weight, target.model.embed_tokens.weight)
    assert not torch.equal(draft.model.layers[0].mlp.up_proj.weight, target.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "source",
    ["layers:4", "layers:0,3", "layers:1,1", "layers:0", "random:0", "random:4", "random:1,2", "layers:", "nowhere"],
)
def test_a_beginning_that_cannot_be_is_refused(target: PreTrainedModel, source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_draft(Init(source), target, ROWS)
    assert caught.value.param == "init" and "\n" not in caught.value.message


def test_what_cannot_be_narrowed_or_shared_is_refused(tmp_path: Path, target: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="25 wide"):
        make_draft(Init("layers:1", mlp=25), target, ROWS)
    for heads in (0, 2):
        with pytest.raises(ConfigError, match=f"cannot have {heads} key/value heads") as caught:
            make_draft(Init("layers:1", kv_heads=heads), target, ROWS)
        assert caught.value.param == "kv_heads"
    for hidden in (0, 33):
        with pytest.raises(ConfigError, match=f"hidden size cannot be {hidden}"):
            make_draft(Init("layers:1", hidden=hidden), target, ROWS)
    del target.model.layers[0].mlp.up_proj
    with pytest.raises(ModelLoadError, match="gated"):
        make_draft(Init("layers:0,1", mlp=12), target, ROWS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError):
        make_draft(Init(str(tmp_path)), target, ROWS)


def test_sharing_is_for_targets_of_our_own_model_code(tmp_path: Path) -> None:
    tiny_target().save_pretrained(tmp_path / "llama")
    ours = open_checkpoint(str(tmp_path / "llama"))
    assert Init("layers:1").settled(ours).shares_embedding is True
    config = tmp_path / "llama" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GemmaForCausalLM"))
    other = open_checkpoint(str(tmp_path / "llama"))
    assert Init("layers:1").settled(other).shares_embedding is False
    assert Init("/some/folder").settled(ours).shares_embedding is None
    assert Init("layers:1", hidden=16).settled(ours).shares_embedding is False
    for shares, checkpoint in ((True, ours), (None, other)):
        with pytest.raises(ConfigError) as caught:
            Init("layers:1", shares_embedding=shares, hidden=16).settled(checkpoint)
        assert caught.value.param == "hidden"
    for init in (Init("/some/folder", mlp=8), Init("/some/folder", kv_heads=1), Init("/some/folder", hidden=8)):
        with pytest.raises(ConfigError, match="keeps its widths"):
            init.settled(ours)
    with pytest.raises(ConfigError, match="share"):
        Init("layers:1", shares_embedding=True).settled(other)
