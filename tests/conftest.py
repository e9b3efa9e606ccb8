"""What holds for every test: nothing is left running, and hypothesis runs under a named profile.

TANDEM_TEST_PROFILE=ci (default): 100 examples of 30 steps, the same in every run. nightly: 1,000, new ones each time.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterable

import hypothesis
import pytest

# Decides whether Triton interprets before anything imports it (transformers does).
pytest_plugins = ["tests.kernels.gpu.triton_mode"]

# Servers and executors may need a moment to wind down after the test has let go of them.
GRACE_S = 2.0
THREADS_BEFORE = pytest.StashKey[set[threading.Thread]]()

hypothesis.settings.register_profile(
    "ci", max_examples=100, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile(
    "nightly", max_examples=1000, stateful_step_count=50, deadline=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("TANDEM_TEST_PROFILE", "ci"))


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            # First in, last out: what the test's own fixtures started, they have stopped by then.
            item.fixturenames.insert(0, "no_stray_tasks")


@pytest.fixture
async def no_stray_tasks() -> AsyncIterator[None]:
    """Fails an asynchronous test whose tasks still run when it and its fixtures are done."""
    yield
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        _, left = await asyncio.wait(left, timeout=GRACE_S)
    assert not left, f"tasks were left behind: {sorted(map(repr, left))}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[THREADS_BEFORE] = set(threading.enumerate())
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    yield
    before = item.stash.get(THREADS_BEFORE, None)
    if before is None:
        return
    give_up_at = time.monotonic() + GRACE_S
    while (left := _stray_threads(before)) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    assert not left, f"threads were left behind: {left}"


def _stray_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
