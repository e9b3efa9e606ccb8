"""One function on several processor cores: processes that are forked, so that what it needs is there already.

Nothing of it need be picklable, a cost model for instance; only its arguments and answers travel.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
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
    with multiprocessing.get_context("fork").Pool(processes, _begin, (function,)) as pool:
        yield cast(Callable[[Iterable[Argument]], Iterator[Answer]], partial(pool.imap, _call))


def _begin(function: Callable[[Any], Any]) -> None:
    # The pool ends its processes by SIGTERM. Whoever was forked may have had a handler that lets them live.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    global _function
    _function = function


def _call(argument: object) -> object:
    assert _function is not None, "the process was started by `forked`"
    return _function(argument)
