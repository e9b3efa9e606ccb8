"""One engine under measurement, in a process of its own that does what it is told:

    python -m bench.engine_arm tandem --random tiny --dtype float32     then, line by line on stdin and stdout
    ◀ {"ready": true, "decodes": true, …}
    ▶ {"prompts": 8, "prompt_tokens": 32, "new_tokens": 64}     exactly so many greedy tokens for each prompt
    ◀ {"seconds": 1.93}
    ▶ {"batch": 8, "context": 2048, "steps": 32}                only to engines that said `decodes`
    ◀ {"seconds": 0.41}

Prompts are random token ids, the same for every engine, all different, so that no prefix cache helps.
`bench/vllm_arm.py` speaks the same, under vLLM's own Python.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any, Literal, Protocol, TextIO

import torch

from kernels.choice import WeightFormat


class Arguments(argparse.Namespace):
    engine: Literal["tandem", "transformers"]
    random: str
    model: str
    dtype: str
    weights: WeightFormat
    kernels: Literal["auto", "torch"]
    device: str
    threads: int
    pin: bool
    tune: bool
    kv_tokens: int
    max_batch: int
    chunk: int


class Engine(Protocol):
    vocab_size: int

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None: ...

    def decode(self, batch: int, context: int, steps: int) -> float: ...


def random_prompts(count: int, tokens: int, seed: int, vocab_size: int) -> list[list[int]]:
    """Ordinary token ids: the first ones of a vocabulary are often special."""
    generator = torch.Generator().manual_seed(seed)
    first, end = min(1000, vocab_size // 2), min(30_000, vocab_size)
    return torch.randint(first, end, (count, tokens), generator=generator).tolist()


def serve(engine: Engine, facts: dict[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Answers until the requests end."""
    print(json.dumps({"ready": True, "decodes": True, **facts}), file=answers, flush=True)
    for serial, line in enumerate(requests):
        request = json.loads(line)
        if "batch" in request:
            seconds = engine.decode(request["batch"], request["context"], request["steps"])
        else:
            prompts = random_prompts(request["prompts"], request["prompt_tokens"], serial, engine.vocab_size)
            began = time.perf_counter()
            engine.generate(prompts, request["new_tokens"])
            seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def load(arguments: Arguments) -> tuple[Engine, dict[str, Any]]:
    """The engine, and what there is to say of it."""
    device = torch.device(arguments.device)
    if arguments.engine == "transformers":
        from bench import transformers_engine

        engine = transformers_engine.load(
            arguments.random, arguments.model, dtype=arguments.dtype, device=device, threads=arguments.threads
        )
        return engine, {}
    from bench import tandem_engine

    if arguments.tune:
        from kernels.gpu import tuning

        tuning.enable()
    ours = tandem_engine.load(
        arguments.random,
        arguments.model,
        dtype=arguments.dtype,
        weight_format=arguments.weights,
        kernels=arguments.kernels,
        device=device,
        threads=arguments.threads,
        pin=arguments.pin,
        kv_tokens=arguments.kv_tokens,
        max_batch=arguments.max_batch,
        chunk=arguments.chunk,
    )
    return ours, {"kernels": ours.kernels, "work": asdict(ours.work)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("tandem", "transformers"))
    parser.add_argument("--random", default="")
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", default="dense")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--kv-tokens", type=int, default=8192)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=2048)
    arguments = parser.parse_args(namespace=Arguments())
    # stdout is the protocol's; what libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(*load(arguments), sys.stdin, answers)


if __name__ == "__main__":
    main()
