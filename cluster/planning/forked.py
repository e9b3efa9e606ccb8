"""One function on several processor cores: processes that are forked, so that what it needs is there already.

Nothing of it need be picklable, a cost model for instance; only its arguments and answers travel.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")

# In a forked process: what it is there to call.
_function: Callable[[Any], Any] | None = None


@contextmanager
def forked(
    function: Callable[[Argument], Answer], processes: int
) -> Iterator[Callable[[Iterable[Argument]], Iterator[Answer]]]:
    """Within: a map of `function`, whose answers come in order, each as soon as it and those before it are there."""
    # Not multiprocessing.Pool: it ends its processes by SIGTERM, and waits for ever for one that has inherited a
    # handler which survives it.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _begin, (function,)) as pool:
        try:
            yield cast(Callable[[Iterable[Argument]], Iterator[Answer]], partial(pool.map, _call))
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    # What the parent had thrown away is not collected here as well: gRPC's objects crash where their threads are not.
    gc.freeze()
    global _function
    _function = function


def _call(argument: object) -> object:
    assert _function is not None, "the process was started by `forked`"
    return _function(argument)
