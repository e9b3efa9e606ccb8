"""One line for each request that has ended: whose it was, how it ended, and how long that took."""

from __future__ import annotations

import logging

from cluster.endings import Ended
from engine.log_fields import about

LOGGER = "tandem.access"

_log = logging.getLogger(LOGGER)


class AccessLog:
    """Implements cluster.endings.Observer."""

    def ended(self, request: Ended) -> None:
        if _log.isEnabledFor(logging.INFO):
            extra = about(request.request_id, request.trace, **_of(request))
            _log.info("request %s", request.outcome.reason, extra=extra)


def _of(request: Ended) -> dict[str, object]:
    """Nothing that its client wrote but the request's id, and no text of an answer."""
    outcome, usage, receipt = request.outcome, request.usage, request.receipt
    fields: dict[str, object] = {
        "reason": outcome.reason,
        "total_s": round(outcome.ended_s - request.arrived_s, 4),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if request.tenant:
        fields["tenant"] = request.tenant
    if outcome.ttft_s is not None:
        fields["ttft_s"] = round(outcome.ttft_s, 4)
    if outcome.tpot_s is not None:
        fields["tpot_s"] = round(outcome.tpot_s, 5)
    if receipt is not None:
        fields |= {"prefill_worker": receipt.prefill_worker, "decode_worker": receipt.decode_worker}
        fields |= {"retries": receipt.retries}
    # What is wrong with a request is told in its client's own words.
    if request.problem and outcome.reason not in ("invalid", "cancelled"):
        fields["problem"] = request.problem
    return fields
