"""Incremental decoding of one sequence, over the tokenizers library's own `DecodeStream`."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loaded with the tokenizer
    import tokenizers
    from tokenizers.decoders import DecodeStream

MAX_PENDING = 64
"""Tokens without a complete character after which what there is, is shown: each step decodes all of them again."""


class Detokenizer:
    """Token ids in, text out, never a part of a character. Joined, the pieces are the text of all tokens."""

    def __init__(
        self, backend: "tokenizers.Tokenizer", prime: Sequence[int], vocab_size: int, skipped_ids: AbstractSet[int]
    ) -> None:
        """Continue the text of the tokens `prime`; tokens in `skipped_ids` and from `vocab_size` on show nothing."""
        self._backend = backend
        self._vocab_size = vocab_size
        self._skipped = skipped_ids
        self._context = list(prime)
        """Tokens of the text shown last: what `DecodeStream` decodes the pending ones together with."""
        self._pending: list[int] = []
        self._stream = self._new_stream()

    def push(self, token_id: int) -> str:
        """Take one more token; returns the text that is complete now."""
        if token_id in self._skipped or token_id >= self._vocab_size:
            return ""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # the library's own type: a later byte made an earlier, complete character invalid
            piece = self._restart(self._backend.decode(self._pending, skip_special_tokens=False))
        if piece is not None:
            self._context, self._pending = self._pending or self._context, []
            return piece
        return self._restart(self._pending_text()) if len(self._pending) >= MAX_PENDING else ""

    def flush(self) -> str:
        """No token follows: returns what is left, broken characters as U+FFFD."""
        text = self._pending_text()
        self._pending = []
        return text

    def _pending_text(self) -> str:
        if not self._pending:
            return ""
        shown = self._backend.decode(self._context, skip_special_tokens=False)
        text = self._backend.decode(self._context + self._pending, skip_special_tokens=False)
        if text.startswith(shown):
            return text[len(shown) :]
        return self._backend.decode(self._pending, skip_special_tokens=False)

    def _restart(self, text: str) -> str:
        """Show `text` for the pending tokens and begin anew after them."""
        self._context, self._pending = [], []
        self._stream = self._new_stream()
        return text

    def _new_stream(self) -> "DecodeStream":
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=self._context, skip_special_tokens=False)
