"""A tiny byte-level tokenizer, a scripted engine and an HTTP client over the application."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from quire.server.app import create_app
from quire.server.settings import ServerSettings
from quire.server.text import Tokenizer

from .fake_client import FakeClient

BOS, EOS = 0, 1
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|bos|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    "{{ mood | default('') }}{{ reasoning_effort | default('') }}"
)
CORPUS = ["hello world, the quick brown fox stops here. The end", "héllo wörld 你好 世界 😀 €"] * 3


def byte_level_backend() -> Backend:
    """Byte-level BPE with a few merges; encodes a BOS token before each text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken("<|bos|>", special=True), AddedToken("<|end|>", special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    return backend


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_backend().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


HttpFactory = Callable[..., httpx.AsyncClient]


@pytest.fixture
async def make_http(client: FakeClient, tokenizer: Tokenizer) -> AsyncIterator[HttpFactory]:
    """HTTP clients over applications with the given settings."""
    opened: list[httpx.AsyncClient] = []

    def make(**settings: Any) -> httpx.AsyncClient:
        app = create_app(client, tokenizer, ServerSettings(served_model_names=("tiny", "org/tiny"), **settings))
        opened.append(httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://quire"))
        return opened[-1]

    yield make
    for http in opened:
        await http.aclose()


@pytest.fixture
def http(make_http: HttpFactory) -> httpx.AsyncClient:
    return make_http()


def events_of(body: str) -> list[Any]:
    """The events of a finished stream, `[DONE]` included as a string."""
    assert body.endswith("\n\n")
    payloads = [block.removeprefix("data: ") for block in body.removesuffix("\n\n").split("\n\n")]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]
