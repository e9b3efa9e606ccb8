"""Prefill and decode of a whole model, beside the engines that a user would pick instead and the device's own limits.

    python -m bench.engine [--dtype float32] [--weights dense] [--batches 1,8,32] [--rounds 5] [--write NAME]
        [--vllm-python PYTHON --hf-folder FOLDER --vllm-preload LIBS] [--llama-bin FOLDER --gguf FILE]
    python -m bench.engine --device cuda --dtype bfloat16 --random llama-3.1-8b --context 2048 --batches 1,64

Every engine is a process of its own that waits while another is measured; in each round all take turns at every point,
so that whatever else the machine does hits all of them. A point's rate is the median over rounds; a ratio is the median
of the rounds' ratios. Prefill is prompt tokens over the time to one token. Decode is the difference between many tokens
and one, from prompts of 32 tokens; or with --context, steps alone, over KV that was put there. llama.cpp brings its own
program, which is run once a round. `--weights int4,int8` compares two of ours, each in a row of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from bench.ceilings import Ceilings, describe, measure_ceilings
from bench.engine_processes import ROOT, Arm, ArmFailed, LlamaCpp, Point, environment_of, process_arm
from bench.model_configs import MODELS
from bench.model_work import MATRIX_BYTES, ModelWork
from bench.report import stamp, table, write_section

PAUSE_S = 0.3


class Arguments(argparse.Namespace):
    model: str
    random: str
    dtype: str
    weights: str
    kernels: str
    device: str
    threads: int
    pin: bool
    tune: bool
    prefill: str
    batches: str
    context: int
    steps: int
    rounds: int
    transformers: bool
    vllm_python: str
    vllm_preload: str
    hf_folder: str
    llama_bin: str
    gguf: str
    write: str

    @property
    def points(self) -> list[Point]:
        prefill = [Point(int(tokens)) for tokens in self.prefill.split(",") if tokens]
        return prefill + [Point(self.context, int(batch)) for batch in self.batches.split(",") if batch]

    @property
    def max_batch(self) -> int:
        return max(1, *(point.batch for point in self.points))


@dataclass(frozen=True, slots=True, eq=False)
class Ours:
    """One of our own arms. `label` tells it from the others, where there are any."""

    arm: Arm
    work: ModelWork
    label: str = ""


class Rates:
    """Tokens per second of each round, by point and arm. An arm that fails is left out from then on."""

    def __init__(self) -> None:
        self._rates: dict[tuple[Point, str], list[float]] = {}
        self.failed: dict[str, str] = {}

    def add(self, point: Point, arm: str, rate: float) -> None:
        self._rates.setdefault((point, arm), []).append(rate)

    def median(self, point: Point, arm: str) -> float | None:
        rates = self._rates.get((point, arm))
        return statistics.median(rates) if rates else None

    def ratio(self, point: Point, ours: str, theirs: str) -> float | None:
        """The median of the rounds' ratios."""
        pairs = zip(self._rates.get((point, ours), ()), self._rates.get((point, theirs), ()), strict=False)
        ratios = [one / other for one, other in pairs]
        return statistics.median(ratios) if ratios else None


def start_ours(arguments: Arguments, stack: ExitStack) -> list[Ours]:
    """Raises ArmFailed."""
    formats = arguments.weights.split(",")
    arms = []
    for weight_format in formats:
        command = [sys.executable, "-m", "bench.engine_arm", "tandem", *_common(arguments)]
        command += ["--weights", weight_format, "--kernels", arguments.kernels]
        command += ["--kv-tokens", str(max(point.room(arguments.steps) for point in arguments.points))]
        command += ["--max-batch", str(arguments.max_batch)]
        command += ["--pin"] * arguments.pin + ["--tune"] * arguments.tune
        name = "Tandem" if len(formats) == 1 else f"Tandem {weight_format}"
        arm = stack.enter_context(process_arm(name, command, environment_of(is_ours=True)))
        print(f"{name} computes with the {arm.facts['kernels']} kernels", file=sys.stderr)
        arms.append(Ours(arm, ModelWork(**arm.facts["work"]), "" if len(formats) == 1 else weight_format))
    return arms


def start_peers(arguments: Arguments, stack: ExitStack, rates: Rates) -> list[Arm]:
    """Those that were asked for. One that does not start is noted, and the others go on."""
    peers: list[Arm] = []
    commands: list[tuple[str, list[str], dict[str, str]]] = []
    if arguments.vllm_python:
        # -P: or this folder would come first in its path, and `kernels` be bench/kernels.py instead of a package's.
        command = [arguments.vllm_python, "-P", str(ROOT / "bench" / "vllm_arm.py"), "--model", arguments.hf_folder]
        command += ["--dtype", arguments.dtype, "--max-batch", str(arguments.max_batch)]
        # What vLLM's documentation advises for CPUs: a core per thread, and the allocator and OpenMP of one's choice.
        advised = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(arguments.threads)))}
        advised |= {"LD_PRELOAD": arguments.vllm_preload} if arguments.vllm_preload else {}
        commands.append(("vLLM", command, advised))
    if arguments.transformers:
        command = [sys.executable, "-m", "bench.engine_arm", "transformers", *_common(arguments)]
        # Its KV grows by a token each step: without this the device's memory would go to pieces.
        commands.append(("transformers", command, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}))
    for name, command, more in commands:
        try:
            peers.append(stack.enter_context(process_arm(name, command, environment_of(is_ours=False, **more))))
        except ArmFailed as failure:
            rates.failed[name] = str(failure)
    if arguments.llama_bin:
        peers.append(LlamaCpp(arguments.llama_bin, arguments.gguf, arguments.threads))
    return peers


def measure(
    arms: Sequence[Arm], points: Sequence[Point], arguments: Arguments, rates: Rates, pause_s: float = PAUSE_S
) -> None:
    """A first round warms up and is thrown away."""
    for turn in range(arguments.rounds + 1):
        for point in points:
            for arm in arms:
                if arm.name in rates.failed or (turn == 0 and isinstance(arm, LlamaCpp)):
                    continue
                # OpenMP threads of the engine before may still spin for a moment.
                time.sleep(pause_s)
                try:
                    rate = arm.measure(point, arguments.steps)
                except ArmFailed as failure:
                    rates.failed[arm.name] = str(failure)
                    continue
                print(f"round {turn}  {point.name:32}  {arm.name:13} {rate:12.1f} tok/s", file=sys.stderr, flush=True)
                if turn:
                    rates.add(point, arm.name, rate)


def report(
    ours: Sequence[Ours], peers: Sequence[str], points: Sequence[Point], steps: int, rates: Rates, ceilings: Ceilings
) -> str:
    """The table, and what its last columns are of."""
    heads = ["", "Tandem, tok/s", *(f"{peer}, tok/s" for peer in peers), *(f"Tandem / {peer}" for peer in peers)]
    rows = []
    for point in points:
        for one in ours:
            rate = rates.median(point, one.arm.name)
            ms = None if rate is None else 1e3 * (point.batch or point.tokens) / rate
            floor_ms = 1e3 * floor_seconds(one.work, point, steps, ceilings)
            rows.append(
                [
                    point.name + (f", {one.label}" if one.label else ""),
                    _number(rate, ",.0f"),
                    *(_number(rates.median(point, peer), ",.0f") for peer in peers),
                    *(_number(rates.ratio(point, one.arm.name, peer), ".2f") for peer in peers),
                    _number(ms, ",.2f"),
                    _number(floor_ms, ",.2f"),
                    _number(None if ms is None else ms / floor_ms, ".2f"),
                ]
            )
    text = table([*heads, "ms", "floor, ms", "ms / floor"], rows)
    text += f"\n\n{_limits(ceilings)}\n\n{_needs(ours, points, steps)}"
    for name, failure in rates.failed.items():
        text += f"\n\n{name} did not finish: {failure.splitlines()[0]}."
    return text


def floor_seconds(work: ModelWork, point: Point, steps: int, ceilings: Ceilings) -> float:
    """Of a decode step: what it must read, at the rate of copying. Of a prompt: its operations, at the rate of a matrix
    product."""
    if point.batch:
        return work.decode_bytes(point.batch, point.context(steps)) / ceilings.copy_bytes_per_s
    return work.prefill_flops(point.tokens) / ceilings.matmul_flops


def run(arguments: Arguments, ceilings: Ceilings) -> str:
    """The report. Raises ArmFailed when it is ours that fails."""
    points, rates = arguments.points, Rates()
    with ExitStack() as stack:
        ours = start_ours(arguments, stack)
        peers = start_peers(arguments, stack, rates)
        measure([*(one.arm for one in ours), *peers], points, arguments, rates)
    for one in ours:
        if one.arm.name in rates.failed:
            raise ArmFailed(rates.failed[one.arm.name])
    return report(ours, [peer.name for peer in peers], points, arguments.steps, rates, ceilings)


def parse(argv: Sequence[str] | None = None) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="the default model's name, a GGUF file or a Hugging Face folder")
    parser.add_argument("--random", default="", choices=("", *MODELS), help="random weights of this model instead")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--weights", default="dense", help="dense, int8, int4, or several with commas between")
    parser.add_argument("--kernels", default="auto", choices=("auto", "torch"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pin", action="store_true", help="bind our threads to CPUs, one each")
    parser.add_argument("--tune", action="store_true", help="let our GPU kernels measure their tile sizes first")
    parser.add_argument("--prefill", default="512,2048", help="prompt lengths")
    parser.add_argument("--batches", default="1,8,32", help="decode batch sizes")
    parser.add_argument("--context", type=int, default=0, help="decode at this context instead of after 32 tokens")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--vllm-python", default="", help="a Python that has vLLM")
    parser.add_argument("--vllm-preload", default="", help="libraries to preload for vLLM, colon-separated")
    parser.add_argument("--hf-folder", default="", help="the same model as a Hugging Face folder, for vLLM")
    parser.add_argument("--llama-bin", default="", help="folder of llama-batched-bench")
    parser.add_argument("--gguf", default="", help="the model file for llama.cpp")
    parser.add_argument("--write", default="", metavar="NAME", help="the section of docs/performance.md to replace")
    arguments = parser.parse_args(argv, namespace=Arguments())
    for weight_format in arguments.weights.split(","):
        if weight_format not in MATRIX_BYTES:
            parser.error(f"--weights: got {weight_format!r}, expected {', '.join(MATRIX_BYTES)}")
    if bool(arguments.vllm_python) != bool(arguments.hf_folder):
        parser.error("--vllm-python and --hf-folder go together")
    if bool(arguments.llama_bin) != bool(arguments.gguf):
        parser.error("--llama-bin and --gguf go together")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    if not arguments.points:
        parser.error("--prefill and --batches are both empty: nothing to measure")
    return arguments


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    ceilings = measure_ceilings(device, getattr(torch, arguments.dtype))
    try:
        text = f"{stamp(describe(device))}\n\n{run(arguments, ceilings)}"
    except ArmFailed as failure:
        raise SystemExit(str(failure)) from None
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


def _common(arguments: Arguments) -> list[str]:
    """What our arm and transformers' are both told."""
    flags = ["--random", arguments.random, "--model", arguments.model, "--dtype", arguments.dtype]
    return [*flags, "--device", arguments.device, "--threads", str(arguments.threads)]


def _limits(ceilings: Ceilings) -> str:
    return (
        f"Limits in the same run: copy {ceilings.copy_bytes_per_s / 1e9:,.1f} GB/s (read and written), read "
        f"{ceilings.read_bytes_per_s / 1e9:,.1f} GB/s, matrix product {ceilings.matmul_flops / 1e9:,.0f} GFLOP/s."
    )


def _needs(ours: Sequence[Ours], points: Sequence[Point], steps: int) -> str:
    """What the floors count."""
    parts = []
    for one in ours:
        label, work = f"{one.label}: " if one.label else "", one.work
        parts.append(f"{label}weights {work.weight_bytes / 1e9:,.3f} GB")
        for point in points:
            if point.batch:
                kv = work.decode_bytes(point.batch, point.context(steps)) - work.weight_bytes
                parts.append(f"KV at batch {point.batch} {kv / 1e9:,.3f} GB")
            else:
                parts.append(f"{point.tokens} tokens {work.prefill_flops(point.tokens) / 1e12:,.2f} TFLOP")
    return f"The floors count: {'; '.join(parts)}."


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    main()
