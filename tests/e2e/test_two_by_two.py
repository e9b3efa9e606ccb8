"""Two prefill and two decode workers on a real local Ray: 64 requests at once, of mixed length, all of them right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from tandem.client import Client

from tests.e2e.service import serving
from tests.golden import snapshot
from tests.golden.default_model import require_default_model

# Of the golden answers' 48 tokens; the lengths mix.
ANSWER_TOKENS = (3, 8, 16, 24)
TIE = 1e-3
CONFIG = """
engine: {threads: 1, kv_cache_bytes: 268435456}
gateway: {router: {policy: least_loaded}}
cluster: {grpc_port: 0}
"""

pytestmark = [pytest.mark.model, pytest.mark.ray, pytest.mark.timeout(600)]


def test_64_requests_at_once(tmp_path: Path) -> None:
    require_default_model()
    with serving(tmp_path, "--address", "ray", "--prefill", "2", "--decode", "2", config=CONFIG) as served:
        asyncio.run(ask_all(served.address))
        assert served.stop() == 0


async def ask_all(address: str) -> None:
    goldens = snapshot.read()
    async with Client(address, timeout_s=500) as client:
        answers = await asyncio.gather(*(ask(client, golden, index) for index, golden in enumerate(goldens)))
        for golden, (token_ids, _) in zip(goldens, answers, strict=True):
            assert_same_or_tie(golden, token_ids)
        assert len(answers) == 64
        used = {worker for _, workers in answers for worker in workers}
        assert used == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
        await all_empty(client)


async def ask(client: Client, golden: snapshot.Golden, index: int) -> tuple[list[int], tuple[str, str]]:
    """Greedy, the end tokens ruled out, as the snapshot was made."""
    count = ANSWER_TOKENS[index % len(ANSWER_TOKENS)]
    answer = await client.complete(golden.token_ids, temperature=0.0, max_tokens=count, min_tokens=count)
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].token_ids) == count
    return list(answer.choices[0].token_ids), (answer.receipt.prefill_worker, answer.receipt.decode_worker)


def assert_same_or_tie(golden: snapshot.Golden, token_ids: Sequence[int]) -> None:
    for position, token_id in enumerate(token_ids):
        if token_id != golden.expected[position]:
            assert golden.gaps[position] < TIE, f"{golden.id}: token {position} is {token_id}"
            return


async def all_empty(client: Client) -> None:
    """Every worker's next heartbeat says that it holds nothing."""
    async with asyncio.timeout(10):
        while True:
            workers = (await client.status()).workers
            held = [w for w in workers if w.running or w.waiting or w.blocks_free != w.blocks_total]
            if not held and len(workers) == 4:
                return
            await asyncio.sleep(0.2)
