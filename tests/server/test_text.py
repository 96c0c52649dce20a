"""Tokenizer, incremental decoding, token strings, chat templates."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from quire.core.errors import InvalidRequestError, ModelLoadError
from quire.server.text import INLINE_CHARS, Tokenizer

from .conftest import BOS, EOS, byte_level_backend

BYTE_LEVEL = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level_backend()))


def metaspace_tokenizer() -> Tokenizer:
    """Like Llama 2: pieces with a leading mark for a space, single bytes as fallback."""
    pieces = ["<s>", "▁hello", "▁world", "!", "€", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


METASPACE = metaspace_tokenizer()
FIRST_BYTE = 5
"""Id of `<0x00>` in the metaspace tokenizer."""


def streamed(tokenizer: Tokenizer, ids: list[int], prompt_ids: tuple[int, ...] = ()) -> list[str]:
    decoder = tokenizer.detokenizer(prompt_ids)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(st.text(max_size=60))
def test_joined_pieces_are_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    pieces = streamed(BYTE_LEVEL, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 20), max_size=60))
def test_any_tokens_decode_as_in_one_go(ids: list[int]) -> None:
    """Random tokens are mostly broken UTF-8."""
    assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(st.lists(st.integers(0, METASPACE.vocab_size - 1), max_size=60))
def test_byte_fallback_never_fails(ids: list[int]) -> None:
    """Where a later byte makes earlier ones invalid, text that was shown stays; else it is as decoded in one go."""
    joined = "".join(streamed(METASPACE, ids))
    whole = METASPACE.decode(ids)
    assert joined == whole or "\ufffd" in whole


def test_a_byte_that_spoils_a_complete_character_is_survived() -> None:
    euro = [FIRST_BYTE + byte for byte in "€".encode()]
    pieces = streamed(METASPACE, [*euro, FIRST_BYTE + 0xFF, 1])
    assert pieces[:3] == ["", "", "€"]
    assert "".join(pieces).startswith("€")
    assert "".join(pieces).endswith(" hello")


def test_multibyte_characters_come_whole() -> None:
    ids = [FIRST_BYTE + byte for byte in "😀".encode()]
    assert streamed(METASPACE, ids) == ["", "", "", "😀", ""]
    assert streamed(METASPACE, ids[:2]) == ["", "", "\ufffd\ufffd"]


def test_a_prompt_keeps_the_leading_space() -> None:
    assert "".join(streamed(METASPACE, [2], prompt_ids=(1,))) == " world"
    assert "".join(streamed(METASPACE, [2])) == "world"
    assert "".join(streamed(METASPACE, [2], prompt_ids=(1, 0))) == "world"


def test_endless_broken_bytes_are_shown_in_time() -> None:
    broken = BYTE_LEVEL.backend.token_to_id("â")
    assert broken is not None
    pieces = streamed(BYTE_LEVEL, [broken] * 1000)
    assert "".join(pieces) == "\ufffd" * 1000
    assert max(map(len, pieces)) <= 64


def test_special_tokens_are_skipped_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = [BOS, *tokenizer.encode("hello", False), EOS]
    assert tokenizer.decode(ids) == "hello"
    assert "".join(streamed(tokenizer, ids)) == "hello"
    shown = tokenizer.detokenizer(skip_special_tokens=False)
    assert "".join([*map(shown.push, ids), shown.flush()]) == "<|bos|>hello<|end|>"


async def test_encode(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hello")[0] == BOS
    assert BOS not in tokenizer.encode("hello", add_special_tokens=False)
    long = "hello world " * INLINE_CHARS
    assert await tokenizer.encode_async(long) == tokenizer.encode(long)
    assert tokenizer.decode(tokenizer.encode(long)) == long
    with pytest.raises(InvalidRequestError, match="Unicode"):
        tokenizer.encode("\ud800")


def test_training_truncation_is_ignored(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "hello world, hello world, hello world"
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode(text)) == text


def test_token_strings_and_bytes() -> None:
    euro = "€".encode()
    byte_ids = [FIRST_BYTE + byte for byte in euro]
    assert [METASPACE.token_bytes(i) for i in byte_ids] == [bytes([byte]) for byte in euro]
    assert METASPACE.token_text(byte_ids[0]) == "bytes:\\xe2"
    assert METASPACE.token_text(1) == " hello"
    assert METASPACE.token_text(0) == "<s>"
    assert BYTE_LEVEL.token_text(EOS) == "<|end|>"
    assert BYTE_LEVEL.token_bytes(99_999) == b""


@given(st.text(max_size=40))
def test_token_bytes_join_to_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == text.encode()


def test_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat_prompt(messages) == "<|bos|>user: hi\nassistant:"
    assert tokenizer.chat_prompt(messages, add_generation_prompt=False, template_kwargs={"mood": "!"}) == (
        "<|bos|>user: hi\n!"
    )


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "conversation", "add_generation_prompt", "kwargs"])
def test_template_arguments_of_the_library_are_out_of_reach(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} cannot be set"):
        tokenizer.chat_prompt([{"role": "user", "content": "hi"}], template_kwargs={name: True})


def test_a_template_that_refuses_or_is_missing_is_the_clients_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no tools here"):
        tokenizer.chat_prompt([{"role": "tool", "content": "x"}])
    with pytest.raises(InvalidRequestError, match="no chat template"):
        BYTE_LEVEL.chat_prompt([{"role": "user", "content": "hi"}])


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no such model folder: .*/nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"cannot load the tokenizer of .*: it has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ModelLoadError, match="cannot load the tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers 5.17 itself imports torch with anything"
)
def test_the_server_needs_no_torch(model_folder: Path) -> None:
    """Neither importing the application nor loading a tokenizer.json nor applying its template brings torch."""
    program = (
        "import json, re, sys\n"
        "import quire.server.app\n"
        "from quire.server.text import Tokenizer\n"
        f"tokenizer = Tokenizer.load({str(model_folder)!r})\n"
        "tokenizer.encode(tokenizer.chat_prompt([{'role': 'user', 'content': 'hi'}]))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())\n"
        "megabytes = int(peak[1]) / 1024\n"
        "print(json.dumps(['torch' in sys.modules, megabytes]))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    has_torch, megabytes = json.loads(result.stdout)
    assert not has_torch
    assert megabytes < 200
