"""How fast KV comes from each prefill worker, as measured of the streams that this worker pulls.

Measured is what comes after the prompt's first token: all of the prompt is computed then, and nothing but the link
holds the rest back. A short rest says little and is passed over.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.running_average import RunningAverage

MIN_BYTES = 64 << 10
# Addresses that are remembered; those measured last stay.
MAX_ADDRESSES = 1024


class LinkRates:
    """Bytes per second by address, as running averages over streams."""

    def __init__(self) -> None:
        self._rates: OrderedDict[str, RunningAverage] = OrderedDict()

    def add(self, address: str, received_bytes: int, seconds: float) -> None:
        """`received_bytes` came from `address` in `seconds`."""
        if received_bytes <= MIN_BYTES or seconds <= 0:
            return
        self._rates.setdefault(address, RunningAverage(0.2)).add(received_bytes / seconds)
        self._rates.move_to_end(address)
        if len(self._rates) > MAX_ADDRESSES:
            self._rates.popitem(last=False)

    def rates(self) -> tuple[tuple[str, float], ...]:
        return tuple((address, rate.value) for address, rate in self._rates.items())
