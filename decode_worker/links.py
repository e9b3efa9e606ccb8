"""What a decode worker sees of its links to prefill workers: how fast KV comes by them, and what came damaged.

Speed is measured of what comes after a prompt's first token: all of the prompt is computed then, and nothing but the
link holds the rest back. A short rest says little and is passed over.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

from decode_worker.stream import Submit
from engine.log_fields import about
from engine.running_average import RunningAverage

MIN_BYTES = 64 << 10
# Addresses that are remembered; those measured last stay.
MAX_ADDRESSES = 1024

_log = logging.getLogger(__name__)


class PrefillLinks:
    """Implements decode_worker.pull.Watch. Speeds are bytes per second by address, as running averages over streams;
    over all links `faults` counts frames that were not taken, and `kv_bytes` the KV of those that were."""

    def __init__(self) -> None:
        self._rates: OrderedDict[str, RunningAverage] = OrderedDict()
        self.faults = 0
        self.kv_bytes = 0

    def took(self, kv_bytes: int) -> None:
        self.kv_bytes += kv_bytes

    def moved(self, address: str, kv_bytes: int, seconds: float) -> None:
        """`kv_bytes` came from `address` in `seconds`."""
        if kv_bytes <= MIN_BYTES or seconds <= 0:
            return
        self._rates.setdefault(address, RunningAverage(0.2)).add(kv_bytes / seconds)
        self._rates.move_to_end(address)
        if len(self._rates) > MAX_ADDRESSES:
            self._rates.popitem(last=False)

    def damaged(self, address: str, problem: str, of: Submit) -> None:
        self.faults += 1
        _log.warning("KV from prefill worker %s: %s", address, problem, extra=about(of.own_id, of.trace))

    def rates(self) -> tuple[tuple[str, float], ...]:
        return tuple((address, rate.value) for address, rate in self._rates.items())
