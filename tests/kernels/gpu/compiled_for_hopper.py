"""Compiles what a launcher would launch, for a Hopper GPU that need not be there: Triton brings all it takes.

`calls` runs in a process of its own, because Triton either interprets or compiles in one. Tensors come from the CPU;
nothing is executed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PRELUDE = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Hopper())
run = JITFunction.run

def compile_only(self, *args, warmup, **kwargs):
    kernel = run(self, *args, warmup=True, **kwargs)
    print(json.dumps({"name": self.__name__, "shared": kernel.metadata.shared, "ttgir": kernel.asm["ttgir"]}))

JITFunction.run = compile_only
"""


def compile_for_hopper(calls: str) -> list[dict[str, Any]]:
    """What was compiled, in order: each kernel's name, bytes of shared memory, and TritonGPU IR."""
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + calls],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]
