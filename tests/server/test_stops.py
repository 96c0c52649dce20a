"""Stop strings: what is shown does not depend on how the text was cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.stops import StopFilter

SMALL_TEXT = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), min_size=1, max_size=4)


def reference(text: str, stops: list[str], armed_from: int = 0) -> tuple[str, str | None]:
    """The shortest prefix that ends with a stop string, without its longest such stop string."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(borders)]


@given(SMALL_TEXT, STOPS, st.lists(st.integers(0, 100)))
def test_any_cut_shows_the_reference_text(text: str, stops: list[str], cuts: list[int]) -> None:
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.push(piece) for piece in pieces_of(text, cuts))
    shown += stop_filter.flush()
    assert (shown, stop_filter.hit) == reference(text, stops)


@given(SMALL_TEXT, SMALL_TEXT, STOPS, st.lists(st.integers(0, 100)))
def test_stops_that_end_before_the_minimum_do_not_count(
    before: str, after: str, stops: list[str], cuts: list[int]
) -> None:
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.push(piece, armed=False) for piece in pieces_of(before, cuts))
    shown += "".join(stop_filter.push(piece) for piece in pieces_of(after, cuts)) + stop_filter.flush()
    assert (shown, stop_filter.hit) == reference(before + after, stops, armed_from=len(before))


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["END"], ["abE", "N", "Dxyz"], ["ab", "", ""]),
        (["END"], ["abE", "NX"], ["ab", "ENX"]),
        (["aab"], ["aa", "a", "b"], ["", "a", ""]),
        (["\n\n"], ["a\n", "b"], ["a", "\nb"]),
        ([], ["anything"], ["anything"]),
    ],
)
def test_withholds_only_what_may_become_a_stop(stops: list[str], pieces: list[str], shown: list[str]) -> None:
    stop_filter = StopFilter(stops)
    assert [stop_filter.push(piece) for piece in pieces] == shown


def test_nothing_follows_a_hit() -> None:
    stop_filter = StopFilter(["x"])
    assert stop_filter.push("axb") == "a"
    assert stop_filter.push("more") == ""
    assert stop_filter.flush() == ""
    assert stop_filter.hit == "x"
