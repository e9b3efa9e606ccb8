"""Requests that have ended, as observers are told of them."""

from __future__ import annotations

from cluster.endings import Ended
from cluster.messages import Usage
from cluster.outcomes import Outcome, Reason
from engine.objectives import Objectives
from engine.request import FinishReason, Receipt

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.1)
RECEIPT = Receipt(prefill_worker="p", decode_worker="d", kv_bytes=3000)


def ended(
    request_id: str = "r",
    at_s: float = 10.0,
    reason: Reason = "finished",
    *,
    tenant: str = "",
    ttft_s: float | None = 0.5,
    tpot_s: float | None = 0.05,
    was_local: bool = False,
    problem: str = "",
    receipt: Receipt | None = RECEIPT,
) -> Ended:
    """By default one that was in time, over p and d."""
    return Ended(
        request_id=request_id,
        tenant=tenant,
        arrived_s=at_s - 2.0,
        outcome=Outcome(at_s, OBJECTIVES, ttft_s, tpot_s, was_local, reason),
        problem=problem,
        usage=Usage(20, 8, 4),
        finish_reasons=(FinishReason.LENGTH,),
        receipt=receipt,
    )
