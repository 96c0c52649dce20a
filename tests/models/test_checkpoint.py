"""Broken, incomplete and foreign checkpoints are refused in one line that names what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.core.errors import ConfigError, ModelLoadError
from quire.models.checkpoint import open_checkpoint
from quire.models.loading import checkpoint_dtype

from .conftest import load


def _edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _shard_of(folder, tensor):
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / weight_map[tensor]


def _rewrite(file, change):
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _refusal(folder, kind=ModelLoadError, **options):
    with pytest.raises(kind) as caught:
        load(folder, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_sharded_checkpoints_load_with_progress(broken):
    assert len(list(broken.folder.glob("*.safetensors"))) > 1
    seen = []
    load(broken.folder, on_progress=lambda phase, done, total: seen.append((phase, done, total)))
    phases, done, totals = zip(*seen, strict=True)
    assert set(phases) == {"loading weights"} and len(set(totals)) == 1
    assert list(done) == sorted(done) and done[-1] == totals[0] > 0


def test_truncated_shard(broken):
    shard = _shard_of(broken.folder, "model.layers.2.mlp.up_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-100])
    for runner in ("native", "transformers"):
        message = _refusal(broken.folder, runner=runner)
        assert shard.name in message and "truncated" in message


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"not json" + b"\0" * 8])
def test_files_that_are_not_safetensors(broken, content):
    shard = _shard_of(broken.folder, "model.norm.weight")
    shard.write_bytes(content)
    assert shard.name in _refusal(broken.folder)


def test_missing_shard(broken):
    shard = _shard_of(broken.folder, "model.norm.weight")
    shard.unlink()
    assert f"lacks the shard {shard.name}" in _refusal(broken.folder)


def test_index_that_disagrees_with_its_shard(broken):
    shard = _shard_of(broken.folder, "model.norm.weight")
    _rewrite(shard, lambda tensors: tensors.pop("model.norm.weight"))
    message = _refusal(broken.folder)
    assert "model.norm.weight" in message and shard.name in message


def test_index_that_leads_out_of_the_folder(broken):
    index = broken.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    assert "not a plain file name" in _refusal(broken.folder)


def test_missing_tensor(broken):
    index = broken.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.self_attn.k_proj.weight"]
    index.write_text(json.dumps(content))
    message = _refusal(broken.folder)
    assert "lacks the tensor model.layers.1.self_attn.k_proj.weight" in message


def test_unexpected_tensor(broken):
    _edit_config(broken.folder, num_hidden_layers=2)
    message = _refusal(broken.folder)
    assert "model.layers.2." in message and "does not have" in message


def test_wrong_shape(broken):
    name = "model.layers.0.mlp.down_proj.weight"
    shard = _shard_of(broken.folder, name)
    _rewrite(shard, lambda tensors: tensors.update({name: torch.zeros(32, 47)}))
    message = _refusal(broken.folder)
    assert name in message and "[32, 47]" in message and "[32, 48]" in message and shard.name in message


def test_wrong_shape_through_transformers(broken):
    name = "model.layers.0.mlp.down_proj.weight"
    _rewrite(_shard_of(broken.folder, name), lambda tensors: tensors.update({name: torch.zeros(32, 47)}))
    assert "transformers cannot load it" in _refusal(broken.folder, runner="transformers")


def test_integer_weights_are_not_taken_for_plain_ones(broken):
    name = "model.layers.0.mlp.down_proj.weight"
    shard = _shard_of(broken.folder, name)
    _rewrite(shard, lambda tensors: tensors.update({name: torch.zeros(32, 48, dtype=torch.int8)}))
    assert "stored as I8" in _refusal(broken.folder)


def test_pickled_weights_only(broken):
    for file in broken.folder.glob("*.safetensors*"):
        file.unlink()
    (broken.folder / "pytorch_model.bin").write_bytes(b"")
    message = _refusal(broken.folder)
    assert "pytorch_model.bin" in message and "save_pretrained" in message


def test_no_weights_at_all(broken):
    for file in broken.folder.glob("*.safetensors*"):
        file.unlink()
    assert "holds no *.safetensors" in _refusal(broken.folder)


def test_broken_and_missing_config(broken):
    config = broken.folder / "config.json"
    config.write_text('{"model_type": "llama",')
    assert "config.json cannot be read as JSON" in _refusal(broken.folder)
    config.write_text("[1]")
    assert "must hold a JSON object" in _refusal(broken.folder)
    config.unlink()
    assert "holds no config.json" in _refusal(broken.folder)


def test_config_values_that_cannot_be(broken):
    _edit_config(broken.folder, num_hidden_layers="three")
    assert "config.json" in _refusal(broken.folder)
    _edit_config(broken.folder, num_hidden_layers=0)
    assert "num_hidden_layers" in _refusal(broken.folder)


def test_unknown_architectures_are_named(broken):
    _edit_config(broken.folder, model_type="frobnicator", architectures=["FrobnicatorForCausalLM"])
    message = _refusal(broken.folder)
    assert "FrobnicatorForCausalLM" in message and "frobnicator" in message
    _edit_config(broken.folder, model_type="bert", architectures=["BertForMaskedLM"])
    assert "BertForMaskedLM is not a causal language model" in _refusal(broken.folder)


def test_remote_code_only_where_it_is_allowed(broken):
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    _edit_config(broken.folder, model_type="x", architectures=["XForCausalLM"], auto_map=auto_map)
    assert "trust_remote_code" in _refusal(broken.folder)


def test_quantized_checkpoints_are_not_for_the_native_runner(broken):
    _edit_config(broken.folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized (gptq)" in _refusal(broken.folder, ConfigError, runner="native")


def test_folders_and_hub_names_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr("quire.models.checkpoint.snapshot_download", _offline)
    assert "no such model folder" in _refusal(tmp_path / "nowhere")
    assert "cannot be fetched from the hub: no connection" in _refusal("someone/some-model")
    (tmp_path / "file").write_text("")
    assert "is a file" in _refusal(tmp_path / "file")


def _offline(name, **options):
    raise OSError("no connection")


def test_hub_names_are_looked_up_in_the_cache_first(broken, monkeypatch):
    asked = []

    def snapshot(name, *, local_files_only=False, **options):
        asked.append((name, local_files_only))
        return str(broken.folder)

    monkeypatch.setattr("quire.models.checkpoint.snapshot_download", snapshot)
    assert load("someone/some-model").spec.name == "someone/some-model"
    assert asked == [("someone/some-model", True)]


def test_the_dtype_is_the_configurations_else_the_weights_own(broken):
    assert checkpoint_dtype(str(broken.folder)) == torch.float32
    _edit_config(broken.folder, dtype="bfloat16")
    assert checkpoint_dtype(str(broken.folder)) == torch.bfloat16
    config = json.loads((broken.folder / "config.json").read_text())
    del config["dtype"]
    (broken.folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(broken.folder)).dtype == torch.float32


def test_end_tokens_come_from_the_generation_configuration(broken):
    (broken.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 7]}))
    assert load(broken.folder).spec.eos_token_ids == (7, 9)
    (broken.folder / "generation_config.json").unlink()
    assert load(broken.folder).spec.eos_token_ids == (2,)
