"""What `--draft` accepts, what it makes of it, and one clear line for what does not go together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from quire.core.config import EngineConfig
from quire.core.errors import ConfigError, ModelLoadError
from quire.core.speculation import DraftChoice, parse_draft
from quire.engine.cache import KVCache
from quire.engine.sizing import CacheLayout
from quire.models.loading import weight_bytes
from quire.speculation.hybrid import HybridDrafter
from quire.speculation.layerskip import LayerskipDrafter
from quire.speculation.loading import cache_share, chosen_draft, load_draft, make_drafter
from quire.speculation.model import ModelDrafter
from quire.speculation.ngram import NgramDrafter

from ..models.conftest import CPU, VOCAB, Tiny, load, make_checkpoint
from .world import World, greedy

KV = {"num_key_value_heads": 2}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("target"), "llama", KV)


@pytest.fixture
def draft(tmp_path):
    """A fresh draft of one layer, whose files a test may change."""
    return make_checkpoint(tmp_path / "draft", "llama", KV | {"num_hidden_layers": 1})


def drafter_for(target: Tiny, setting: str, runner: str = "auto", **options):
    loaded = target.load(runner)
    spec, folder = loaded.spec, options.pop("model", target.folder)
    layout = CacheLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, 4, 2, 40, torch.float32)
    cache = KVCache(layout, 60, torch.device("cpu"))
    config = EngineConfig(model=str(folder), draft=setting, page_size=4, max_num_seqs=2)
    draft = load_draft(config, loaded, CPU, lambda phase, done, total: None)
    return make_drafter(config, loaded, draft, cache, CPU, max_model_len=40, num_slots=2)


def write_tokenizer(folder: Path, words: int, first: str = "a") -> None:
    vocab = {f"{first}{i}": i for i in range(words)}
    Tokenizer(WordLevel(vocab, unk_token=f"{first}0")).save(str(folder / "tokenizer.json"))


def share_embedding(made: Tiny, keep_head: bool = False) -> None:
    """Take the embedding and head out of a checkpoint."""
    config = json.loads((made.folder / "config.json").read_text()) | {"quire_shares_embedding": True}
    (made.folder / "config.json").write_text(json.dumps(config))
    (file,) = made.folder.glob("*.safetensors")
    dropped = ("model.embed_tokens.weight",) if keep_head else ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name not in dropped}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("none", DraftChoice("none")),
        ("auto", DraftChoice("auto")),
        ("ngram", DraftChoice("ngram")),
        ("layerskip:12", DraftChoice("layerskip", layers=12)),
        ("some/model", DraftChoice("model", model="some/model")),
        ("ngram+some/model", DraftChoice("hybrid", model="some/model")),
    ],
)
def test_what_the_setting_means(text, choice):
    assert parse_draft(text) == choice
    assert choice.name == text


@pytest.mark.parametrize("text", ["", "  ", "ngram+", "layerskip", "layerskip:", "layerskip:0", "layerskip:2.0"])
def test_settings_that_mean_nothing_are_refused_at_once(text):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", draft=text)
    assert caught.value.param == "draft" and "\n" not in caught.value.message


def test_each_setting_gives_its_drafter(target, draft):
    assert drafter_for(target, "none") is None
    assert isinstance(drafter_for(target, "ngram"), NgramDrafter)
    assert isinstance(drafter_for(target, "layerskip:2"), LayerskipDrafter)
    assert isinstance(drafter_for(target, f"ngram+{draft.folder}"), HybridDrafter)
    by_model = drafter_for(target, str(draft.folder))
    assert isinstance(by_model, ModelDrafter)
    assert by_model.num_bytes == by_model.cache.num_bytes + weight_bytes(draft.load())
    # The target's 60 pages are 10 of each of its 6 heads; the draft gets as many entries, in bundles of 2 heads.
    assert by_model.cache.num_free == 10
    assert cache_share(draft.load(), target.load()) == pytest.approx(1 / 3)


def test_auto_takes_the_draft_that_the_checkpoint_brings_along(target, draft, tmp_path):
    assert isinstance(drafter_for(target, "auto"), NgramDrafter)
    assert chosen_draft(EngineConfig(model=str(target.folder), draft="auto")).name == "ngram"
    bundle = tmp_path / "bundle"
    shutil.copytree(target.folder, bundle)
    shutil.copytree(draft.folder, bundle / "draft")
    assert isinstance(drafter_for(target, "auto", model=bundle), HybridDrafter)
    assert chosen_draft(EngineConfig(model=str(bundle), draft="auto")).name == f"ngram+{bundle / 'draft'}"


def test_auto_does_without_a_draft_that_cannot_be_used(target, draft, tmp_path, caplog):
    """One that shares the target's embedding, where the library's code runs the target; named, it is an error."""
    share_embedding(draft)
    bundle = tmp_path / "bundle"
    shutil.copytree(target.folder, bundle)
    shutil.copytree(draft.folder, bundle / "draft")
    assert isinstance(drafter_for(target, "auto", "transformers", model=bundle), NgramDrafter)
    assert "n-grams draft alone: the draft cannot be used: " in caplog.text
    with pytest.raises(ConfigError, match=r"the draft cannot be used: .* not on the native runner"):
        drafter_for(target, f"ngram+{bundle / 'draft'}", "transformers")


@pytest.mark.parametrize(
    ("setting", "runner", "reason"),
    [
        ("layerskip:3", "auto", "layerskip:3 needs a model of more than 3 layers, .* has 3"),
        ("layerskip:1", "transformers", "native runner only"),
        ("ngrams", "auto", "the draft cannot be used: no such model folder: ngrams"),
    ],
)
def test_drafts_that_do_not_go_with_the_target(target, setting, runner, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        drafter_for(target, setting, runner)
    assert caught.value.param == "draft" and "\n" not in caught.value.message


@pytest.mark.parametrize("width", [VOCAB - 6, VOCAB + 6])
def test_another_padding_of_the_vocabulary_is_fine_where_tokenizers_agree(target, tmp_path, width):
    padded = make_checkpoint(tmp_path / "padded", "llama", KV | {"num_hidden_layers": 1, "vocab_size": width})
    whole = shutil.copytree(target.folder, tmp_path / "whole")
    with pytest.raises(ConfigError, match=rf"has {width} tokens, .* has {VOCAB}, and there are no tokenizers"):
        drafter_for(target, str(padded.folder), model=whole)
    write_tokenizer(whole, 80)
    write_tokenizer(padded.folder, 80, first="b")
    with pytest.raises(ConfigError, match="their tokenizers differ"):
        drafter_for(target, str(padded.folder), model=whole)
    write_tokenizer(padded.folder, 80)
    drafter = drafter_for(target, str(padded.folder), model=whole)
    world = World(drafter, 2, 40, VOCAB)
    world.enter(0, [5, 6, VOCAB - 1, 7])  # an id that the narrower draft has not got
    (got,) = world.propose([0], [4])
    seen = [5, 6, min(VOCAB, width) - 1, 7]
    assert got == greedy(padded.model, seen, 4, vocab_size=VOCAB)


def test_other_tokens_of_equal_number_are_warned_about(target, draft, tmp_path, caplog):
    whole = shutil.copytree(target.folder, tmp_path / "whole")
    write_tokenizer(whole, 80)
    write_tokenizer(draft.folder, 80, first="b")
    assert isinstance(drafter_for(target, str(draft.folder), model=whole), ModelDrafter)
    assert "has another tokenizer" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
def test_a_draft_may_use_the_targets_embedding_and_head(tmp_path, tied):
    target = make_checkpoint(tmp_path / "target", "llama", KV | {"tie_word_embeddings": tied})
    draft = make_checkpoint(tmp_path / "draft", "llama", KV | {"num_hidden_layers": 1, "tie_word_embeddings": tied})
    draft.model.model.embed_tokens.weight.copy_(target.model.model.embed_tokens.weight)
    draft.model.lm_head.weight.copy_(target.model.lm_head.weight)
    own = weight_bytes(draft.load())
    share_embedding(draft)
    drafter = drafter_for(target, str(draft.folder))
    world = World(drafter, 2, 40, VOCAB)
    world.enter(1, [5, 6, 7])
    assert world.propose([1], [5]) == [greedy(draft.model, [5, 6, 7], 5)]
    assert drafter.num_bytes - drafter.cache.num_bytes == own - (1 if tied else 2) * VOCAB * 32 * 4


def test_sharing_needs_a_target_that_fits(target, draft, tmp_path):
    share_embedding(draft)
    with pytest.raises(ModelLoadError, match="it can only be served as a draft"):
        load(draft.folder)
    with pytest.raises(ConfigError, match="the target is not on the native runner"):
        drafter_for(target, str(draft.folder), "transformers")
    wide = make_checkpoint(tmp_path / "wide", "llama", KV | {"hidden_size": 64})
    with pytest.raises(ConfigError, match=r"needs \[96, 32\] in torch.float32, .* has \[96, 64\]"):
        drafter_for(wide, str(draft.folder))
    half = load(target.folder, place=replace(CPU, dtype=torch.bfloat16))
    config = EngineConfig(model=str(target.folder), draft=str(draft.folder))
    with pytest.raises(ConfigError, match=r"torch\.float32, .* in torch\.bfloat16"):
        load_draft(config, half, CPU, lambda phase, done, total: None)
