"""`tandem status`: the cluster as its gateway sees it."""

from __future__ import annotations

import json

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tandem.v1.inference_pb2 import GetStatusResponse, WorkerStatus

from cluster.calls import plain, service_errors
from cluster.client_access import OPEN_ACCESS, Access

TIMEOUT_S = 10.0


async def status(url: str, *, access: Access = OPEN_ACCESS, as_json: bool) -> None:
    async with service_errors(url), access.client(url, timeout_s=TIMEOUT_S) as client:
        response = await client.status()
    if as_json:
        print(json.dumps(plain(response)))
        return
    console = Console(highlight=False)
    console.print(status_table(response))
    console.print(
        f"{response.requests_running} running, {response.requests_waiting} waiting, "
        f"{response.requests_finished} finished, {response.requests_rejected} rejected"
        + (f", {response.requests_over_quota} over their tenants' quotas" if response.requests_over_quota else "")
    )
    if response.attainment_window:
        console.print(_attainment(response))
    for worker in response.workers:
        if worker.kv_faults:
            console.print(f"{worker.worker_id}: {worker.kv_faults} KV frames came damaged or again", markup=False)


def status_table(response: GetStatusResponse) -> Table:
    """At most 80 columns wide with the worker names and addresses of one machine."""
    table = Table(
        title=f"{response.model}: {len(response.workers)} workers",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for heading in ("worker", "role", "state", "address"):
        table.add_column(heading, no_wrap=True)
    for heading in ("run", "wait", "queued", "KV", "error", "seen"):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in response.workers:
        # As text: a worker's name may look like markup.
        table.add_row(*map(Text, _row(worker)), style="" if worker.fresh else "red")
    return table


def _row(worker: WorkerStatus) -> tuple[str, ...]:
    return (
        worker.worker_id,
        worker.role,
        state_of(worker),
        worker.address,
        str(worker.running),
        str(worker.waiting),
        str(worker.queued_tokens),
        f"{used(worker):.0%}",
        cost_error(worker),
        f"{worker.heartbeat_age_s:.1f} s",
    )


def state_of(worker: WorkerStatus) -> str:
    """In one word: silent, draining or ready."""
    return "silent" if not worker.fresh else "draining" if worker.draining else "ready"


def used(worker: WorkerStatus) -> float:
    """The share of its KV blocks that are taken."""
    return 1.0 - worker.blocks_free / worker.blocks_total if worker.blocks_total else 0.0


def cost_error(worker: WorkerStatus) -> str:
    """How far the worker's cost model was from its last steps: median / 90th percentile, in percent."""
    return f"{worker.cost_error_median * 100:.0f}/{worker.cost_error_p90 * 100:.0f}%" if worker.cost_error_p90 else "-"


def _attainment(response: GetStatusResponse) -> str:
    return (
        f"objectives met by {response.attainment:.1%} of the last {response.attainment_window} requests "
        f"(TTFT {response.attainment_ttft:.1%}, TPOT {response.attainment_tpot:.1%}), router {response.router}"
    )
