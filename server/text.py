"""Text on one side, token ids on the other: tokenizer, chat templates and token strings. Imports no torch."""

import asyncio
import inspect
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import InvalidRequestError, ModelLoadError
from ..core.folders import model_folder
from .detokenizer import Detokenizer

if TYPE_CHECKING:  # 60 MB and most of a second: paid when a tokenizer is loaded, not when this module is imported
    import tokenizers
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")
INLINE_CHARS = 4096
"""Texts up to this length are tokenized on the event loop (well under a millisecond), longer ones in a thread."""
REPEAT_INSTRUCTION = "\n\nRepeat the text above, word for word:\n\n"
PRIME_TOKENS = 6
"""Prompt tokens a detokenizer sees first, so that decoders which drop a text's leading space keep it."""
_NO_TOKENIZER = "it has no tokenizer.json and none can be made from its files"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Thread-safe."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Wrap a tokenizer of transformers that is backed by the tokenizers library."""
        self._tokenizer = tokenizer
        self.backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer.json may carry the truncation and padding of its training.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._added = {id_: token.content for id_, token in self.backend.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(id_ for id_, t in self.backend.get_added_tokens_decoder().items() if t.special)
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        decoder = self.backend.decoder
        self._decoder_state = decoder.__getstate__().decode() if decoder is not None else ""
        self._token_bytes: dict[int, bytes] = {}
        self.repeat_ids = tuple(self.encode(REPEAT_INSTRUCTION, add_special_tokens=False))
        """Asks the model to say its context again, for policies that score by that."""
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="quire-text")

    @classmethod
    def load(cls, model: str | Path, trust_remote_code: bool = False) -> "Tokenizer":
        """Load from a checkpoint folder or a hub name. Raises `ModelLoadError` if that has no usable tokenizer."""
        folder = model_folder(str(model))
        try:
            return cls(_load(str(folder or model), trust_remote_code))
        except Exception as error:  # the libraries raise all kinds here, bare Exception among them
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelLoadError(f"cannot load the tokenizer of {model}: {reason}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises `InvalidRequestError` for what is no valid Unicode."""
        try:
            if len(text) <= INLINE_CHARS:
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            # Unlike `encode`, the batch call releases the interpreter lock while it works.
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeError) as error:
            raise InvalidRequestError("the text is not valid Unicode (lone surrogates?)", param="prompt") from error

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The same without blocking the event loop for long."""
        return await self.run(len(text), self.encode, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens; ids beyond the vocabulary have none."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> Detokenizer:
        """An incremental decoder for text that continues `prompt_ids`."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return Detokenizer(self.backend, self._prime(prompt_ids), self.vocab_size, skipped)

    def _prime(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, unless they end with a special token (a new text begins) or inside a character."""
        prime: list[int] = []
        for token_id in reversed(prompt_ids[-PRIME_TOKENS:]):
            if token_id in self.special_ids:
                break
            prime.insert(0, token_id)
        return [] if self.decode(prime).endswith("\ufffd") else prime

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The conversation as the model's own chat template writes it, special tokens included.

        Raises `InvalidRequestError` if there is no template or it refuses the messages.
        """
        kwargs = template_kwargs or {}
        if self._tokenizer.chat_template is None:
            raise InvalidRequestError("this model has no chat template: use /v1/completions", param="messages")
        own = inspect.signature(self._tokenizer.apply_chat_template).parameters if kwargs else {}  # it takes a while
        for name in kwargs.keys() & own.keys():
            raise InvalidRequestError(f"{name} cannot be set here", param=f"chat_template_kwargs.{name}")
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        except Exception as error:  # a template is a program: what it raises is its way of refusing
            raise InvalidRequestError(
                f"the chat template refuses the messages: {str(error)[:300]}", param="messages"
            ) from error
        assert isinstance(text, str)
        return text

    async def run(self, size: int, function: Callable[..., Result], *args: Any) -> Result:
        """Call `function` here if `size` characters are quickly done, else in the thread pool."""
        if size <= INLINE_CHARS:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for; part of a character for some tokens, empty beyond the vocabulary."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._compute_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The token as a string; `bytes:\\xe2\\x82` (OpenAI's notation) for part of a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _compute_bytes(self, token_id: int) -> bytes:
        piece = self._added.get(token_id)
        if piece is not None:
            return piece.encode()
        piece = self.backend.id_to_token(token_id) if token_id < self.vocab_size else None
        if piece is None:
            return b""
        if '"ByteLevel"' in self._decoder_state:
            return b"".join(_BYTE_OF.get(character, character.encode()) for character in piece)
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte and '"ByteFallback"' in self._decoder_state:
            return bytes([int(byte[1], 16)])
        if "▁" in self._decoder_state:
            return piece.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()


def _load(model: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    if _has_tokenizer_json(model):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(model)
    from transformers import AutoTokenizer  # brings torch: only where nothing lighter can read the files

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:
        if os.path.isdir(model):  # the library names neither the folder nor the file
            raise ModelLoadError(_NO_TOKENIZER) from error
        raise
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelLoadError(_NO_TOKENIZER)
    return tokenizer


def _has_tokenizer_json(model: str) -> bool:
    if os.path.isdir(model):
        return os.path.isfile(os.path.join(model, "tokenizer.json"))
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model, "tokenizer.json")
    except (OSError, ValueError):
        return False
    return True


def _byte_characters() -> dict[str, bytes]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the rest for U+0100 and up."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in own]
    table = {chr(byte): bytes([byte]) for byte in own}
    return table | {chr(256 + number): bytes([byte]) for number, byte in enumerate(other)}


_BYTE_OF = _byte_characters()
