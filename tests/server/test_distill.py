"""`quire distill` from beginning to end on a tiny target, through the real engine; and what it refuses."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from quire.core.config import embedded_model
from quire.core.errors import ConfigError, ModelLoadError, QuireError
from quire.core.top_rows import pack_rows
from quire.server import cli, distil

FAST = [
    "--device", "cpu", "--length", "24", "--steps", "4", "--round-rows", "8", "--passes", "1",
    "--batch-rows", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, folder / name)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"x = {n}\ny =", "domain": "sums"}) + "\n" for n in range(40)))
    return path


def run(target: Path, out: Path, *options: str) -> str:
    init = [] if "--preset" in options else ["--init", "layers:1"]
    command = ["distill", "--target", str(target), "--out", str(out), *FAST, *init, *options]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_draft_and_its_report(tmp_path: Path, target: Path, prompts: Path) -> None:
    out = tmp_path / "run"
    said = run(target, out, "--data", str(prompts), "--no-share-embedding")
    assert "round 0: 8 rows" in said and "round 1: 8 rows" in said and "held-out acceptance" in said
    draft = AutoModelForCausalLM.from_pretrained(out / "draft")
    assert (out / "draft" / "tokenizer.json").is_file(), "it can be served by itself"
    assert draft.config.num_hidden_layers == 1 and draft.config.eos_token_id == 0
    report = json.loads((out / "report.json").read_text())
    assert report["progress"]["step"] == 4 and report["settings"]["schedule"]["steps"] == 4
    assert set(report["after"]["acceptance"]) == {"all", "sums"} and 0 < report["after"]["acceptance"]["all"] < 1
    assert report["after"]["acceptance"] != report["before"]["acceptance"]
    assert set(report["costs"]["draft"]) == {"1", "4", "16", "64"} and report["costs"]["target"]["320"] > 0
    text = (out / "report.md").read_text()
    assert "| sums |" in text and "| 64 |" in text
    assert (out / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [0, 2]
    again = run(target, out, "--data", str(prompts), "--no-share-embedding")
    assert "going on at step 4 of 4" in again and "round" not in again, "nothing is left but to report"
    with pytest.raises(ConfigError, match="other settings"):
        run(target, out, "--data", str(prompts))


def test_a_run_that_never_began_leaves_the_folder_free(
    tmp_path: Path, target: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "_step_seconds", lambda llm, size: 1e-3)
    for options in (["--data", "nowhere.jsonl"], ["--data", str(prompts), "--init", "layers:9"]):
        with pytest.raises(ConfigError):
            run(target, tmp_path / "run", *options)
    assert "report.md" in run(target, tmp_path / "run", "--data", str(prompts))


def test_without_prompts_the_target_begins_itself(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "_step_seconds", lambda llm, size: 1e-3)  # seconds of the other test's time
    run(target, tmp_path / "run", "--self", "--mix", "0,1,1", "--kv-heads", "1", "--mlp", "16")
    config = json.loads((tmp_path / "run" / "draft" / "config.json").read_text())
    assert config["quire_shares_embedding"] is True and config["intermediate_size"] == 16
    assert [config[name] for name in ("num_key_value_heads", "num_attention_heads", "head_dim")] == [1, 1, 16]
    assert set(json.loads((tmp_path / "run" / "report.json").read_text())["after"]["acceptance"]) == {"all", "self"}


def test_a_preset_says_how_the_draft_begins(
    tmp_path: Path, target: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "_step_seconds", lambda llm, size: 1e-3)
    options = ["--data", str(prompts), "--steps", "2", "--mix", "1,0,0", "--preset", "small"]
    assert "preset:small is layers:2, feed-forward 6\n" in run(target, tmp_path / "run", *options)
    config = json.loads((tmp_path / "run" / "draft" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 6)
    for more in (["--init", "layers:1"], ["--mlp", "6"], ["--kv-heads", "1"], ["--hidden", "8"]):
        with pytest.raises(ConfigError, match="--preset takes no --init"):
            run(target, tmp_path / "other", *options, *more)


def traffic_log(path: Path, target: Path, sharper: float = 1.0) -> Path:
    """Texts as a server logs them, with what the target says, or one of `sharper` logits."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with path.open("w") as file:
        for number in range(30):
            ids = [(7 * number + 3 * place) % 900 + 10 for place in range(20)]
            with torch.inference_mode():
                said = (sharper * model(torch.tensor([ids])).logits[0, 4:-1]).log_softmax(-1).topk(20)
            rows = b"".join(pack_rows(said.indices.numpy(), said.values.numpy()))
            packed = {"version": 1, "top": 20, "rows": base64.b64encode(rows).decode()}
            file.write(json.dumps({"prompt_ids": ids[:5], "output_ids": ids[5:], "target": packed}) + "\n")
    return path


def test_logged_traffic_is_learned_from_as_it_was_logged(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "_step_seconds", lambda llm, size: 1e-3)
    log = traffic_log(tmp_path / "log", target)
    said = run(target, tmp_path / "run", "--from-traffic", str(log), "--mix", "1,0,0", "--steps", "2")
    assert "round 0: 8 rows (8 as logged), 152 tokens" in said, "19 of each, of which 15 count"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["progress"]["tokens"] == 2 * 4 * 15
    said = run(target, tmp_path / "hot", "--from-traffic", str(log), "--steps", "2", "--temperature", "2")
    assert "(0 as logged)" in said, "the mass of the others at another temperature is not known"
    other = traffic_log(tmp_path / "other", target, sharper=30.0)
    with pytest.raises(ConfigError, match="are not those of"):
        run(target, tmp_path / "not", "--from-traffic", str(other))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--data", "nowhere.jsonl"], ConfigError),
        (["--self", "--data", "nowhere.jsonl"], ConfigError),
        (["--init", "layers:9"], ConfigError),
        (["--steps", "0"], ConfigError),
        (["--mix", "1,1"], ConfigError),
        (["--length", "513"], ConfigError),
        (["--out", "/proc/run"], ConfigError),
        (["--mix", "0,0,0"], ConfigError),
        (["--mix", "a,b,c"], QuireError),
        (["--temperatures", "-1"], ConfigError),
        (["--temperature", "0"], ConfigError),
        (["--draft-tokens", "17"], ConfigError),
        (["--target", "/nowhere"], ModelLoadError),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, target: Path, options: list[str], error: type[QuireError]
) -> None:
    with pytest.raises(error) as caught:
        run(target, tmp_path / "run", *options)
    assert "\n" not in caught.value.message
