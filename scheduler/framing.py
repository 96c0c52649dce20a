"""Messages on a stream of bytes: each is preceded by its length."""

from collections.abc import Iterator

_HEAD = 4
"""Bytes of the length, big-endian."""


def framed(message: bytes) -> bytes:
    """What is sent of a message. Raises `OverflowError` from 4 GiB on."""
    return len(message).to_bytes(_HEAD, "big") + message


class Unframer:
    """Puts messages together again, however the stream was cut into pieces."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Each message that is complete with this piece of the stream; take all of them before the next piece."""
        self._rest += piece
        start = 0
        while (body := start + _HEAD) <= len(self._rest):
            end = body + int.from_bytes(self._rest[start:body], "big")
            if end > len(self._rest):
                break
            yield bytes(self._rest[body:end])
            start = end
        del self._rest[:start]
