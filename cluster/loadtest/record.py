"""What became of one request, as its client saw it.

Times are the client's own: TTFT = first chunk with tokens − request sent. TPOT = (last chunk − first chunk) / (tokens −
1), none for an answer of one token. A gap (ITL) lies between two chunks that carried tokens: a chunk of several tokens
ends one gap, and adds none of zero length. A run's rejects, time-outs and failures are misses of both objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.objectives import Objectives

# given_up: not sent or cut off, because the run could not attain its target any more.
Ending = Literal["answered", "rejected", "timed_out", "failed", "given_up"]


@dataclass(frozen=True, slots=True)
class Record:
    """`arrival_s` is when the request was due, from the start of the run; `late_s` how much later it was sent.
    `end_s` is the time from sending to the end, whatever the end was. `asked_tokens` is the output length asked for.
    `receipt` is where Tandem says the time went, None from others."""

    index: int
    arrival_s: float
    late_s: float
    ending: Ending
    end_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    asked_tokens: int = 0
    error: str = ""
    receipt: Mapping[str, Any] | None = None

    def has_ttft(self, objectives: Objectives) -> bool:
        """Whether the request was answered, and its first token came in time."""
        return self.ending == "answered" and self.ttft_s is not None and objectives.has_ttft(self.ttft_s)

    def has_tpot(self, objectives: Objectives) -> bool:
        """Whether the request was answered, and its tokens came fast enough; one token alone always does."""
        return self.ending == "answered" and (self.tpot_s is None or objectives.has_tpot(self.tpot_s))

    def is_met(self, objectives: Objectives) -> bool:
        return self.has_ttft(objectives) and self.has_tpot(objectives)

    @property
    def done_s(self) -> float:
        """When it ended, from the start of the run."""
        return self.arrival_s + self.late_s + self.end_s


_SECONDS = {"late_s": "late_ms", "end_s": "end_ms", "ttft_s": "ttft_ms", "tpot_s": "tpot_ms"}
_PLAIN = ("index", "arrival_s", "ending", "prompt_tokens", "cached_tokens", "output_tokens", "asked_tokens", "error")
DIGITS = 3


def to_json(record: Record, *, with_gaps: bool) -> dict[str, Any]:
    """A record as results.json holds it; times in milliseconds, to a microsecond."""
    values: dict[str, Any] = {name: getattr(record, name) for name in _PLAIN}
    values["arrival_s"] = round(record.arrival_s, 6)
    for name, key in _SECONDS.items():
        seconds = getattr(record, name)
        values[key] = None if seconds is None else round(1e3 * seconds, DIGITS)
    if with_gaps:
        values["gaps_ms"] = [round(1e3 * gap_s, DIGITS) for gap_s in record.gaps_s]
    values["receipt"] = None if record.receipt is None else dict(record.receipt)
    return values


def from_json(values: Mapping[str, Any]) -> Record:
    """What `to_json` gave. Raises KeyError or TypeError for what it did not."""
    fields: dict[str, Any] = {name: values[name] for name in _PLAIN}
    fields |= {name: None if values[key] is None else values[key] / 1e3 for name, key in _SECONDS.items()}
    gaps_s = tuple(gap_ms / 1e3 for gap_ms in values.get("gaps_ms", ()))
    return Record(**fields, gaps_s=gaps_s, receipt=values.get("receipt"))
