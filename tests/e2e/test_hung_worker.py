"""A worker whose step never comes back ends by itself, in a known time, and is replaced; its streams go on."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from cluster.messages import Chunk, Complete, GenerateRequest
from cluster.step_watch import TICK_S
from cluster.watchdog import EXIT_CODE
from cluster.worker_process import HUNG_END_S
from engine.sampling import SamplingParams
from tests.e2e.tiny_cluster import LENGTHS, TOKENS, answers, cluster, lives, save
from tests.tiny_models import prompt_of

pytestmark = pytest.mark.timeout(600)
STEP_LIMIT_S = 3.0
# From the hung step to the end of its process: what is documented, and some seconds for a machine that is busy.
ENDS_WITHIN_S = STEP_LIMIT_S + HUNG_END_S + 5.0
# Python imports this in every process. A forward pass hangs as soon as the file names its worker.
HANGING = """
import sys, threading
from pathlib import Path

if "--id" in sys.argv:
    from engine.torch_runner import TorchRunner

    run_now, named = TorchRunner.run_now, Path({file!r})
    worker_id = sys.argv[sys.argv.index("--id") + 1]

    def hang(*args, **kwargs):
        if named.exists() and named.read_text() == worker_id:
            threading.Event().wait()
        return run_now(*args, **kwargs)

    TorchRunner.run_now = hang
"""


async def test_a_hung_worker_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save(tmp_path / "model")
    file = tmp_path / "hangs"
    (tmp_path / "sitecustomize.py").write_text(HANGING.format(file=str(file)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    expected = await answers(folder)
    log: list[str] = []
    loop = asyncio.get_running_loop()
    async with cluster(folder, log, each=1, step_limit_s=STEP_LIMIT_S) as (gateway, fleet):
        before = lives(gateway)
        # Frozen for longer than a step may take: that is not hung.
        fleet.signal("decode-0", signal.SIGSTOP)
        await asyncio.sleep(STEP_LIMIT_S + 4 * TICK_S)
        fleet.signal("decode-0", signal.SIGCONT)
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
        seen: list[int] = []
        hung_s = ended_s = 0.0
        async for part in gateway.generate(GenerateRequest("", tuple(prompt_of(LENGTHS[1])), params)):
            if isinstance(part, Complete):
                complete = part
                continue
            assert isinstance(part, Chunk)
            seen += [token.token_id for token in part.tokens]
            if not hung_s:
                assert lives(gateway) == before, "nobody has ended so far"
                file.write_text("decode-0")
                hung_s = loop.time()
                ending = f"worker decode-0 ended with exit code {EXIT_CODE}; starting it again (2 more)"
                async with asyncio.timeout(ENDS_WITHIN_S):
                    while ending not in log:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                ended_s = loop.time()
                file.unlink()
        assert seen == expected[LENGTHS[1]]
        assert complete.receipt.retries == 1
        assert ended_s - hung_s > STEP_LIMIT_S
        after = lives(gateway)
        assert after["decode-0"] > before["decode-0"]
        assert after["prefill-0"] == before["prefill-0"]
    assert any("decode-0: tandem: a step of 1 tokens has not come back" in line for line in log), log
    assert any("in hang" in line for line in log), "where it hangs is told"
