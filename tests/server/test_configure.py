"""What the command line says reaches the settings of engine and HTTP layer."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quire.core.config import EngineConfig, embedded_model
from quire.core.errors import QuireError
from quire.server.cli import app
from quire.server.keys import ApiKey
from quire.server.serving import ServeOptions

OPTIONS: dict[str, tuple[list[str], Any]] = {
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float32"], "float32"),
    "runner": (["--runner", "transformers"], "transformers"),
    "attention_backend": (["--attention-backend", "triton"], "triton"),
    "cuda_graphs": (["--no-cuda-graphs"], False),
    "max_model_len": (["--max-model-len", "512"], 512),
    "max_stream_len": (["--max-stream-len", "100000"], 100000),
    "trust_remote_code": (["--trust-remote-code"], True),
    "max_num_seqs": (["--max-num-seqs", "3"], 3),
    "max_batch_tokens": (["--max-batch-tokens", "256"], 256),
    "max_waiting": (["--max-waiting", "7"], 7),
    "kv_memory": (["--kv-memory", "2MiB"], 2 * 2**20),
    "page_size": (["--page-size", "8"], 8),
    "prefix_cache": (["--no-prefix-cache"], False),
    "pressure": (["--pressure", "prune"], "prune"),
    "draft": (["--draft", "layerskip:2"], "layerskip:2"),
    "draft_tokens": (["--draft-tokens", "5"], 5),
    "policy": (["--policy", "fair"], "fair"),
    "max_itl_ms": (["--max-itl-ms", "30"], 30.0),
    "max_waiting_tokens": (["--max-waiting-tokens", "900"], 900),
    "queue_timeout": (["--queue-timeout", "1.5"], 1.5),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    asked: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", asked.append)
    return asked


def test_every_option_of_the_engine_reaches_it(started: list[ServeOptions]) -> None:
    arguments = [word for words, _ in OPTIONS.values() for word in words]
    assert CliRunner().invoke(app, ["serve", "/some/model", *arguments], catch_exceptions=False).exit_code == 0
    values = {name: value for name, (_, value) in OPTIONS.items()}
    assert started[0].engine == EngineConfig(model="/some/model", **values)


def test_without_options_the_defaults_hold(started: list[ServeOptions]) -> None:
    assert CliRunner().invoke(app, ["serve"], catch_exceptions=False).exit_code == 0
    (options,) = started
    assert options.engine == EngineConfig(model=str(embedded_model()))
    assert (options.host, options.port, options.http.served_model_names) == ("127.0.0.1", 8000, ("quire-mini",))
    assert not options.http.api_keys and options.http.prune is None


def test_the_api_is_set_up_by_its_own_options(started: list[ServeOptions]) -> None:
    arguments = ["--host", "::1", "--port", "0", "--served-model-name", "a", "--served-model-name", "b", "--seed", "4"]
    keys = ["--api-key", "team=secret", "--admin-key", "ops=boss", "--isolate-keys"]
    pages = ["--cors-origin", "https://a.example", "--cors-origin", "https://b.example"]
    assert CliRunner().invoke(app, ["serve", *arguments, *keys, *pages], catch_exceptions=False).exit_code == 0
    (options,) = started
    assert (options.host, options.port, options.http.seed, options.http.isolate_keys) == ("::1", 0, 4, True)
    assert options.http.served_model_names == ("a", "b")
    assert options.http.api_keys == (ApiKey("team", "secret"), ApiKey("ops", "boss", admin=True))
    assert options.http.cors_origins == ("https://a.example", "https://b.example")


def test_what_cannot_be_is_refused_before_anything_is_loaded(started: list[ServeOptions], tmp_path: Path) -> None:
    for wrong, named in (
        (["--served-model-name", ""], "served_model_name"),
        (["--served-model-name", "a", "--served-model-name", "a"], "served_model_name"),
        (["--prune-keep", "2"], "prune.keep"),
        (["--cache-file", str(tmp_path)], "cache_file"),
        (["--cache-file", str(tmp_path / "no" / "file")], "cache_file"),
        (["--api-key", "x", "--admin-key", "x"], "api_key"),
    ):
        error = CliRunner().invoke(app, ["serve", *wrong]).exception
        assert isinstance(error, QuireError) and error.param == named, wrong
    assert not started
