"""Whether Triton interprets or compiles in this process: once decided, it cannot be both.

`@triton.jit` looks at TRITON_INTERPRET when it decorates, and Triton decorates its own library when it is first
imported (which transformers does, too). So the variable is set before any test module is collected: this file is a
plugin of tests/conftest.py, and the folder's own conftest.py takes the hook over for a run of nothing else.

    pytest                     interprets: no GPU needed, and one that is there is not used
    pytest -m "… not gpu"      interprets: what `make test` runs
    pytest -m gpu              compiles: the very same tests on the GPU
    TRITON_INTERPRET=… pytest  as it says
"""

from __future__ import annotations

import os
import re

import pytest


def pytest_configure(config: pytest.Config) -> None:
    asks_for_gpu = re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr"))
    os.environ.setdefault("TRITON_INTERPRET", "0" if asks_for_gpu else "1")
    # What Triton has always done; 3.9 warns at every start that the default will change, and warnings are errors here.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def is_interpreted() -> bool:
    """As Triton's own library was decorated, not as the variable says now."""
    import triton.language
    from triton.runtime.jit import JITFunction

    return not isinstance(triton.language.zeros, JITFunction)
