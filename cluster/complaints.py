"""What decode workers say of prefill workers whose KV did not come: a pull takes two, and either may be at fault.

    one decode worker names one prefill worker          the prefill worker is at fault
    several decode workers name the same one            so it is
    one names several, of whom nobody else complains    its own way to the prefill pool is broken

A complaint counts against a decode worker until it pulls well again, and against a prefill worker until anybody pulls
well from it.
"""

from __future__ import annotations


class Complaints:
    """Of one gateway's requests. Knows a worker from its first complaint, or the first of it, until `forget`."""

    def __init__(self) -> None:
        # Prefill workers by the decode worker that complains of them, and the other way round.
        self._named: dict[str, set[str]] = {}
        self._witnesses: dict[str, set[str]] = {}

    def add(self, decode_id: str, prefill_id: str) -> list[str]:
        """The decode worker could not pull from the prefill worker. Returns those that it complains of, and nobody
        else does, in order of id."""
        named = self._named.setdefault(decode_id, set())
        named.add(prefill_id)
        self._witnesses.setdefault(prefill_id, set()).add(decode_id)
        return sorted(name for name in named if self._witnesses.get(name, set()) <= {decode_id})

    def pulled(self, decode_id: str, prefill_id: str) -> None:
        """A prompt's KV came whole."""
        self._named.pop(decode_id, None)
        self._witnesses.pop(prefill_id, None)

    def forget(self, worker_id: str) -> None:
        """It is gone, or another one has its name."""
        for by_id in (self._named, self._witnesses):
            by_id.pop(worker_id, None)
            for names in by_id.values():
                names.discard(worker_id)
