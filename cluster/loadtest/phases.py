"""Where a request's time went, from the receipts of Tandem."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from cluster.loadtest.point import Point

# Fields of a receipt in the order in which a request passes through them, and how people call them.
PHASES: Mapping[str, str] = {
    "gateway_queue_s": "gateway queue",
    "prefill_queue_s": "prefill queue",
    "prefill_s": "prefill",
    "kv_exposed_s": "KV exposed",
    "decode_queue_s": "decode queue",
    "decode_s": "decode",
}


def phases_of(receipt: Mapping[str, object] | None) -> dict[str, float] | None:
    """Seconds of every phase; None without a receipt that has them all."""
    if receipt is None:
        return None
    found = {name: value for name in PHASES if isinstance(value := receipt.get(name), int | float)}
    return {name: float(value) for name, value in found.items()} if len(found) == len(PHASES) else None


def mean_phases(point: Point) -> dict[str, float] | None:
    """Seconds of every phase over all answered requests; None when nobody has a receipt."""
    records = [record for run in point.runs for record in run.records if record.ending == "answered"]
    known = [phases for record in records if (phases := phases_of(record.receipt)) is not None]
    return {name: fmean(phases[name] for phases in known) for name in PHASES} if known else None
