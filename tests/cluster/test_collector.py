"""A process that serves does not go over what it has loaded again and again."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

from cluster.collector import set_aside_what_is_loaded
from tests.tiny_models import save_model

# A worker, until what it has loaded is set aside. It has no gateway: workers wait for theirs.
WORKER = """
import asyncio, gc, os, sys
from cluster.commands.worker import work
from cluster.config import TandemConfig
from cluster.worker_spec import WorkerSpec
from engine.config import EngineConfig

async def main():
    config = TandemConfig(engine=EngineConfig(model=sys.argv[1], device="cpu", kv_cache_bytes=1 << 20))
    spec = WorkerSpec("decode", "decode-0", "127.0.0.1:1")
    worker = asyncio.create_task(work(spec, config, incarnation=1, has_lifeline=False))
    while not gc.get_freeze_count():
        await asyncio.sleep(0.01)
    print("set aside:", gc.get_freeze_count(), flush=True)
    os._exit(0)

asyncio.run(main())
"""


def test_what_is_there_is_set_aside_and_what_comes_later_is_not() -> None:
    before: list[object] = []
    set_aside_what_is_loaded()
    try:
        after: list[object] = []
        looked_at = {id(thing) for thing in gc.get_objects()}
    finally:
        gc.unfreeze()
    assert id(after) in looked_at
    assert id(before) not in looked_at


def test_a_worker_sets_aside_what_it_has_loaded_before_it_serves(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    # Part of a complete folder; workers do not read it.
    (folder / "tokenizer.json").write_text("{}")
    ran = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.stdout.startswith("set aside: "), ran.stderr
    # torch alone leaves more.
    assert int(ran.stdout.split()[-1]) > 100_000, ran.stdout
