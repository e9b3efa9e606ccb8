"""Stop strings against a naive search over the whole text, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.stop_strings import StopStrings


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Grows the text by one character at a time and looks for a stop string at its end, the longest first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    finder = StopStrings(stops, include)
    emitted, matched = "", None
    for piece in pieces:
        emit, matched = finder.push(piece)
        emitted += emit
    return emitted + finder.flush(), matched


@given(
    st.lists(st.text("ab😀", max_size=6), max_size=12),
    st.lists(st.text("ab😀", min_size=1, max_size=5), max_size=4),
    st.booleans(),
)
def test_equals_the_naive_search_however_the_text_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    assert run(pieces, stops, include) == naive("".join(pieces), stops, include)


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_holds_back_no_more_than_could_still_match(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    emitted = ""
    for seen, character in enumerate(text):
        emit, matched = finder.push(character)
        if matched is not None:
            return
        emitted += emit
        assert text.startswith(emitted)
        rest = text[len(emitted) : seen + 1]
        assert rest == "" or any(stop.startswith(rest) for stop in stops)


def test_holds_back_a_possible_start_and_gives_it_up() -> None:
    finder = StopStrings(["\n\nHuman:"])
    assert finder.push("Hello\n") == ("Hello", None)
    assert finder.push("\nHum") == ("", None)
    assert finder.push("bug") == ("\n\nHumbug", None)
    assert finder.flush() == ""


@pytest.mark.parametrize(("include", "shown"), [(False, "one "), (True, "one STOP")])
def test_matched_string_is_shown_only_when_asked_for(include: bool, shown: str) -> None:
    assert run(["one S", "TO", "P two"], ["STOP"], include) == (shown, "STOP")


def test_text_after_a_match_is_dropped() -> None:
    finder = StopStrings(["x"])
    assert finder.push("axb") == ("a", "x")
    assert finder.push("more") == ("", "x")
    assert finder.flush() == ""


def test_match_that_ends_first_wins() -> None:
    assert run(["abcd"], ["abcd", "bc"], include=False) == ("a", "bc")
    assert run(["abc"], ["bc", "abc"], include=False) == ("", "abc")


def test_without_stops_nothing_is_held_back() -> None:
    finder = StopStrings([])
    assert finder.push("text") == ("text", None)


def test_an_empty_stop_string_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="empty stop string"):
        StopStrings([""])
