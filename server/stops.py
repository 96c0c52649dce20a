"""Stop strings on text that arrives in pieces, across token borders."""

from collections.abc import Sequence


class _Matcher:
    """Knuth-Morris-Pratt over one stop string: `state` characters of it end the text read so far."""

    __slots__ = ("_failure", "pattern", "state")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self._failure = [0] * len(pattern)
        length = 0
        for position in range(1, len(pattern)):
            while length and pattern[position] != pattern[length]:
                length = self._failure[length - 1]
            length += pattern[position] == pattern[length]
            self._failure[position] = length

    def read(self, character: str) -> bool:
        """Read one more character; True when the whole pattern ends here."""
        while self.state and self.pattern[self.state] != character:
            self.state = self._failure[self.state - 1]
        self.state += self.pattern[self.state] == character
        complete = self.state == len(self.pattern)
        if complete:  # go on with the longest start of the pattern that ends it too
            self.state = self._failure[-1]
        return complete


class StopFilter:
    """Passes text on until a stop string is complete, and withholds what may be the start of one.

    The stop string whose end comes first wins, the longest of those that end at the same character; what is passed
    on does not depend on how the text was cut into pieces. An occurrence that ends while the filter is not armed
    does not count.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._matchers = [_Matcher(stop) for stop in stops]
        self._withheld = ""
        self.hit: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str, armed: bool = True) -> str:
        """Take the next piece of text; returns what may be shown now. After a hit nothing more is shown."""
        if not self._matchers:
            return text
        if self.hit is not None:
            return ""
        pending = self._withheld + text
        for end in range(len(self._withheld), len(pending)):
            found = [matcher.pattern for matcher in self._matchers if matcher.read(pending[end])]
            if found and armed:
                self.hit = max(found, key=len)
                self._withheld = ""
                return pending[: end + 1 - len(self.hit)]
        shown = len(pending) - max(matcher.state for matcher in self._matchers)
        self._withheld = pending[shown:]
        return pending[:shown]

    def flush(self) -> str:
        """The text is complete without a hit: returns what was withheld."""
        rest, self._withheld = self._withheld, ""
        return rest
