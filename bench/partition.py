"""What clients see while the network between two halves of a cluster loses packets, fails, and comes back.

    sudo python -m bench.partition [--prefill 2] [--decode 2] [--down 30] [--json]

    namespace tandem-near                           namespace tandem-far
    gateway, decode workers, clients ──── link ──── prefill workers

    good ── 10 s ──▶ 5 % of packets lost, 50 ms delay ── 20 s ──▶ down ── 30 s ──▶ up, lossy ── 20 s ──▶ the load ends

Every prompt is computed on the far side (`allow_local: false`), so all of it depends on the link, and while the link is
down both sides must come to hold nothing. Real namespaces and a real link (bench/lossy_link.py); needs root on Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console
from tandem.client import Client

from bench.lossy_link import FAR, FAR_ADDRESS, NEAR, NEAR_ADDRESS, Link, Quality, namespaces, open_link, set_up
from cluster.calls import service_errors
from cluster.chaos.clients import references
from cluster.chaos.cluster import running_cluster
from cluster.chaos.faults import Happened
from cluster.chaos.load import load_while
from cluster.chaos.plan import ChaosPlan
from cluster.chaos.report import make_report
from cluster.commands.running import run
from cluster.config import TandemConfig
from cluster.environment import quiet_libraries
from cluster.progress import Progress
from cluster.registry import Role
from cluster.worker_spec import worker_names
from engine.errors import TandemError

GOOD_S = 10.0
LOSSY_S = 20.0
BAD = Quality(loss=0.05, delay_s=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32, help="KV of SmolLM2 is 45 KiB a token")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--down", type=float, default=30.0, help="seconds without the link")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        quiet_libraries()
        sys.exit(0 if run(measure(options)) else 1)
    if sys.platform != "linux" or os.geteuid() != 0:
        sys.exit("partition: network namespaces need root on Linux")
    try:
        with namespaces():
            inside = [sys.executable, "-m", "bench.partition", "--inside", *sys.argv[1:]]
            sys.exit(subprocess.run(["ip", "netns", "exec", NEAR, *inside], check=False).returncode)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or b""
        sys.exit(f"partition: {error} {said.decode()}".rstrip())


async def measure(options: argparse.Namespace) -> bool:
    """Prints the report; returns whether all is as it should be."""
    plan = ChaosPlan(
        seconds=GOOD_S + 2 * LOSSY_S + options.down,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        prompts=8,
        seed=options.seed,
        faults=(),
    )
    config = _config(options.prefill, options.decode, route_wait_s=options.down + 60.0)
    console = Console(highlight=False, stderr=True)
    names = [worker_id for _, worker_id in worker_names(config.cluster)]
    happened: list[Happened] = []
    with open_link(random.Random(options.seed)) as link:
        console.print(f"the link: {link.name}")
        try:
            async with running_cluster(config, Progress(console), place=_place) as cluster:
                url, leases = cluster.service.address, cluster.observer.leases
                async with service_errors(url), Client(url) as client:
                    known = await references(client, plan.prompts, plan.prompt_tokens, plan.answer_tokens, plan.seed)
                    weather = _weather(link, options.down, names, happened, console)
                    load = await load_while(weather, client, url, plan, known, names)
        except TandemError as error:
            sys.exit(f"partition: {error}")
    of_prefill = [fault for fault in happened if fault.worker_id.startswith("prefill-")]
    report = make_report(load, of_prefill, leases.held_s(of_prefill), lease_s=config.cluster.lease_s)
    empty_s = {fault.worker_id: leases.empty_s(fault.worker_id, fault.time_s, fault.until_s) for fault in happened}
    if options.json:
        print(json.dumps({"link": link.name, **report.as_json(), "empty_s": empty_s}))
    else:
        print("\n".join(report.lines()))
        for name, seconds in empty_s.items():
            print(f"{name}: held its last block {seconds:.2f} s after the link went down")
    return report.is_clean and all(seconds <= config.cluster.lease_s for seconds in empty_s.values())


def _config(prefill: int, decode: int, route_wait_s: float) -> TandemConfig:
    """`route_wait_s`: requests wait out the time without any prefill worker."""
    gateway = {"heartbeat_interval_s": 0.5, "fresh_s": 2, "route_wait_s": route_wait_s}
    return TandemConfig.model_validate(
        {
            "engine": {"threads": 1, "kv_cache_bytes": 128 << 20},
            "gateway": {**gateway, "router": {"allow_local": False}, "failures": {"max_attempts": 50}},
            "cluster": {
                "prefill": prefill,
                "decode": decode,
                "address": "none",
                "grpc_host": NEAR_ADDRESS,
                "grpc_port": 0,
            },
        }
    )


def _place(role: Role, command: Sequence[str]) -> Sequence[str]:
    if role == "prefill":
        return ["ip", "netns", "exec", FAR, *command, "--host", FAR_ADDRESS]
    return command


async def _weather(link: Link, down_s: float, names: Sequence[str], happened: list[Happened], console: Console) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(GOOD_S)
    console.print(f"{BAD.loss:.0%} of packets are lost, {BAD.delay_s * 1e3:g} ms delay")
    link.set(BAD)
    await asyncio.sleep(LOSSY_S)
    console.print(f"the link is down for {down_s:g} s")
    set_up(FAR, False)
    down_at_s = loop.time()
    await asyncio.sleep(down_s)
    set_up(FAR, True)
    console.print("the link is up again")
    happened += [Happened("partition", name, down_at_s, loop.time()) for name in names]
    await asyncio.sleep(LOSSY_S)


if __name__ == "__main__":
    main()
