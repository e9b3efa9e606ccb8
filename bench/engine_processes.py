"""The engines that bench/engine.py compares, each a process that waits while another is measured."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[1]
# Prompts of a decode measurement whose context is not given.
PROMPT_TOKENS = 32


class ArmFailed(Exception):
    """An engine ended, or could not do what it was asked."""


@dataclass(frozen=True, slots=True)
class Point:
    """Prefill of one prompt of `tokens` when `batch` is 0; else decode of `batch` sequences, at a context of `tokens`
    or, when that is 0, from prompts of 32 tokens on."""

    tokens: int
    batch: int = 0

    @property
    def name(self) -> str:
        if not self.batch:
            return f"prefill, {self.tokens} tokens"
        return f"decode, batch {self.batch}" + (f", context {self.tokens}" if self.tokens else "")

    def context(self, steps: int) -> float:
        """Tokens of a sequence in the middle of decoding."""
        return self.tokens or PROMPT_TOKENS + steps / 2

    def prompt_tokens(self, steps: int) -> int:
        """Of a prompt that leads there."""
        return max(1, self.tokens - steps // 2) if self.tokens else PROMPT_TOKENS

    def room(self, steps: int) -> int:
        """KV slots that an engine needs, with some to spare."""
        return max(1, self.batch) * ((self.tokens or PROMPT_TOKENS) + 2 * steps + 16)


class Arm(Protocol):
    name: str

    def measure(self, point: Point, steps: int) -> float:
        """Tokens per second. Raises ArmFailed."""
        ...


class ProcessArm:
    """A process that speaks the protocol of bench/engine_arm.py. `facts`: what it said when it was ready."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process
        self.facts = self._read()

    def measure(self, point: Point, steps: int) -> float:
        if not point.batch:
            return point.tokens / self._seconds(prompts=1, prompt_tokens=point.tokens, new_tokens=1)
        if point.tokens and self.facts.get("decodes"):
            return point.batch * steps / self._seconds(batch=point.batch, context=point.tokens, steps=steps)
        # Many tokens less one.
        prompt = {"prompts": point.batch, "prompt_tokens": point.prompt_tokens(steps)}
        both = self._seconds(**prompt, new_tokens=steps + 1)
        return point.batch * steps / max(both - self._seconds(**prompt, new_tokens=1), 1e-9)

    def _seconds(self, **request: int) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ArmFailed(f"{self.name} ended with status {self._process.wait()}") from None
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ArmFailed(f"{self.name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaCpp:
    """llama.cpp's own batched benchmark: one run per point and round."""

    name = "llama.cpp"

    def __init__(self, folder: str, gguf: str, threads: int) -> None:
        self._command = [f"{folder}/llama-batched-bench", "-m", gguf, "-t", str(threads), "-tb", str(threads)]

    def measure(self, point: Point, steps: int) -> float:
        prompt, batch, new = point.tokens, 1, 1
        if point.batch:
            prompt, batch, new = point.prompt_tokens(steps), point.batch, steps
        flags = ["-npp", str(prompt), "-ntg", str(new), "-npl", str(batch), "--output-format", "jsonl"]
        flags += ["-c", str(max(512, 2 * batch * (prompt + new))), "-b", "2048", "-ub", "512"]
        done = subprocess.run(
            [*self._command, *flags], capture_output=True, text=True, check=False, env=environment_of(is_ours=False)
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(lines) != 1:
            raise ArmFailed(f"llama.cpp ended with status {done.returncode}: {done.stderr[-500:]}")
        result = json.loads(lines[0])
        return float(result["speed_tg"] if point.batch else result["speed_pp"])


@contextmanager
def process_arm(name: str, command: list[str], environment: dict[str, str]) -> Iterator[ProcessArm]:
    """Starts an engine and waits until it is loaded. Raises ArmFailed."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    try:
        yield ProcessArm(name, process)
    finally:
        process.kill()
        process.communicate()


def environment_of(is_ours: bool, **more: str) -> dict[str, str]:
    """Peers keep OpenMP's own way of waiting, as their users do."""
    return {key: value for key, value in os.environ.items() if is_ours or key != "OMP_WAIT_POLICY"} | more
