"""Triton's interpreter without most of the time that it takes besides computing.

As of 3.9 each call of one jitted function by another looks through all of `triton.language` for functions to replace,
some milliseconds long. Here the kernel's own call does that, for both modules that kernels and Triton's library use,
and what it calls relies on it: the same replacements. And every sum and product of integers is computed twice, to
find overflows; that is left to tests which ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest


@contextmanager
def quick_interpreter(finds_overflows: bool = False) -> Iterator[None]:
    """For tests that interpret. Contexts may be nested; the innermost says whether int32 overflows are errors."""
    from triton.language import standard
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang
    run_kernel = interpreter.GridExecutor.__call__
    depth = 0

    def patch_once(fn: Any) -> Any:
        return interpreter._LangPatchScope() if depth > 0 else patch_lang(fn)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal depth
        scope = patch_lang(standard.sum.fn)
        own = patch_lang(self.fn)
        depth += 1
        try:
            # Infinity is a float like any other to a GPU.
            with np.errstate(over="ignore"):
                run_kernel(self, *args, **kwargs)
        finally:
            depth -= 1
            own.restore()
            scope.restore()

    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=finds_overflows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", run)
        yield
