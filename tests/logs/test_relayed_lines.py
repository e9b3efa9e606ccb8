"""What workers say goes through the service that started them."""

from __future__ import annotations

import asyncio
import sys

import pytest

from cluster.cluster_config import ClusterConfig
from cluster.config import TandemConfig
from cluster.logs.logging_config import LoggingConfig
from cluster.processes import ProcessFleet

SAYS = """
import sys
for line in ('{"message": "said"}', "at 127.0.0.1:1"):
    print(line, file=sys.stderr, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("form", ["text", "json"])
async def test_objects_stay_objects_and_all_else_is_for_people(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    cluster = ClusterConfig(prefill=0, decode=1, address="none")
    config = TandemConfig(cluster=cluster, logging=LoggingConfig.model_validate({"format": form}))
    log: list[str] = []
    fleet = ProcessFleet(config, log.append, program=lambda role, worker_id: [sys.executable, "-c", SAYS])
    await fleet.open()
    try:
        await fleet.start("127.0.0.1:1")
        async with asyncio.timeout(60):
            while "decode-0: at 127.0.0.1:1" not in log:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.02)
    finally:
        await fleet.close()
    objects = ['{"message": "said"}'] if form == "json" else []
    assert capfd.readouterr().err.splitlines() == objects
    assert ('decode-0: {"message": "said"}' in log) is not bool(objects)
