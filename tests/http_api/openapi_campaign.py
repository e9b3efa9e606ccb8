"""Thousands of requests made up from the OpenAPI document, to a real service: `make test-openapi`.

    python -m tests.http_api.openapi_campaign [--cases 10000] [--seed 1]

Whatever ends with a status of 500 or more, or with an answer that the document does not describe, ends the campaign
with the smallest such request.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.e2e.service import eventually, serving
from tests.http_api.openapi_cases import run

# So little KV that an answer without a limit is soon at its end.
CONFIG = """
engine: {kv_cache_bytes: 8388608}
gateway: {heartbeat_interval_s: 0.2}
cluster: {grpc_port: 0}
"""
IDLE_S = 30.0


def campaign(cases: int, seed: int) -> tuple[Counter[str], float]:
    """How often each path has answered with each status, and how many seconds that took."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), "--address", "none", config=CONFIG) as served:
        start_s = time.perf_counter()
        counts = run(served.openai_url.removesuffix("/v1"), cases, seed)
        took_s = time.perf_counter() - start_s
        eventually(served.is_idle, IDLE_S)
    return counts, took_s


def report(counts: Counter[str], took_s: float) -> Table:
    table = Table("request", "status", title=f"{counts.total():,} requests in {took_s:,.0f} s")
    table.add_column("count", justify="right")
    for name, count in sorted(counts.items()):
        request, _, status = name.rpartition(" ")
        table.add_row(request, status, f"{count:,}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="another one asks for other things")
    arguments = parser.parse_args()
    Console(width=100).print(report(*campaign(arguments.cases, arguments.seed)))


if __name__ == "__main__":
    main()
