"""`tandem chaos`: a local cluster under load, faults on its workers, and what its clients saw."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

from rich.console import Console

from cluster.calls import service_errors
from cluster.chaos.clients import references
from cluster.chaos.cluster import ChaosCluster, running_cluster
from cluster.chaos.faults import Injector
from cluster.chaos.load import load_while
from cluster.chaos.plan import ChaosPlan, Clock, OfLinks
from cluster.chaos.report import ChaosReport, make_report
from cluster.client_access import read_access
from cluster.config import TandemConfig
from cluster.progress import Progress
from cluster.worker_spec import worker_names


async def chaos(config: TandemConfig, plan: ChaosPlan, api_key_file: Path | None, *, as_json: bool) -> bool:
    """Prints the report; returns whether all is as it should be. Raises TandemErrors for what cannot be started."""
    console = Console(highlight=False, stderr=as_json)
    has_relay, is_warped = plan.has(OfLinks), plan.has(Clock)
    async with running_cluster(config, Progress(console), has_relay=has_relay, is_warped=is_warped) as cluster:
        report = await _run(cluster, config, plan, api_key_file, console)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        for line in report.lines():
            print(line)
    return report.is_clean


async def _run(
    cluster: ChaosCluster, config: TandemConfig, plan: ChaosPlan, api_key_file: Path | None, console: Console
) -> ChaosReport:
    url, observer = cluster.service.address, cluster.observer
    names = [worker_id for _, worker_id in worker_names(config.cluster)]
    certs = config.security.client_certs
    access = read_access(api_key_file, None if certs is None else certs / "ca.crt", url)
    async with service_errors(url), access.client(url) as client:
        console.print(f"asking {plan.prompts} prompts without faults")
        known = await references(client, plan.prompts, plan.prompt_tokens, plan.answer_tokens, plan.seed)
        console.print(f"{plan.streams} streams and faults for {plan.seconds:g} s")
        injector = Injector(cluster, random.Random(plan.seed))
        load = await load_while(injector.run(plan.faults, plan.seconds), client, url, plan, known, names)
    # Workers that hold nothing have still to say how many frames came damaged.
    await asyncio.sleep(2 * config.gateway.heartbeat_interval_s)
    return make_report(
        load,
        injector.happened,
        observer.leases.held_s(injector.happened),
        lease_s=config.cluster.lease_s,
        flips=observer.flips,
        unread=observer.unread,
        kv_faults=observer.kv_faults,
    )
