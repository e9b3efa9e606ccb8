"""Finds stop strings in text that comes in pieces, and holds back what could still become one.

    all text   [ emitted ............ )[ held back: the longest end of the text that begins some stop string )

Matching is Knuth, Morris and Pratt's: per stop string one number says how much of it the text's end matches, so each
character costs the same however the text was cut into pieces. The match that ends first wins; of those that end at the
same character, the longest, which is the one that starts first.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The stop strings of one sequence. After a match everything that follows is dropped."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include`: the matched string itself is emitted too."""
        assert all(stops), "an empty stop string would match before the first character"
        self._patterns = [_Pattern(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece; returns what may be shown now, and the stop string that ended the text, if one did."""
        if self._matched is not None:
            return "", self._matched
        if not self._patterns:
            return text, None
        text_start = len(self._held)
        self._held += text
        for index in range(text_start, len(self._held)):
            for pattern in self._patterns:
                if pattern.feed(self._held[index]):
                    return self._finish(pattern.stop, index + 1), pattern.stop
        keep = max(pattern.matched_chars for pattern in self._patterns)
        cut = len(self._held) - keep
        emit, self._held = self._held[:cut], self._held[cut:]
        return emit, None

    def flush(self) -> str:
        """The text held back: it ended before it could become a stop string."""
        emit, self._held = self._held, ""
        return emit

    def _finish(self, stop: str, end: int) -> str:
        emit = self._held[: end if self._include else end - len(stop)]
        self._matched, self._held = stop, ""
        return emit


class _Pattern:
    """One stop string and how many of its characters the text's end matches."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched_chars = 0
        self._fallback = _fallbacks(stop)

    def feed(self, character: str) -> bool:
        """Takes one character; true when the text now ends with the stop string."""
        while self.matched_chars and self.stop[self.matched_chars] != character:
            self.matched_chars = self._fallback[self.matched_chars - 1]
        if self.stop[self.matched_chars] == character:
            self.matched_chars += 1
        return self.matched_chars == len(self.stop)


def _fallbacks(stop: str) -> list[int]:
    """For each n > 0, at n − 1: the longest proper start of stop[:n] that is also its end."""
    lengths = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[index] != stop[matched]:
            matched = lengths[matched - 1]
        if stop[index] == stop[matched]:
            matched += 1
        lengths[index] = matched
    return lengths
