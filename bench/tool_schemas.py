"""Answers held to real tool schemas: do all that end by themselves parse and validate?

    python -m bench.tool_schemas [--data FILE] [--limit 160] [--max-tokens 200] [--kinds object,calls]

The file is ../shared/data/prompts/bfcl_tools.jsonl unless another is named.

A service of two processes with the default model, and the openai package. Every line of the file is asked four times:
for an object of its first tool's parameters, and for calls of its tools (`tool_choice: required`), greedily and
sampled. Answers that reach `--max-tokens` are cut off wherever they are, and are only counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from bench.servers import Server, running

DATA = Path(__file__).parents[2] / "shared" / "data" / "prompts" / "bfcl_tools.jsonl"
AT_ONCE = 8
CONFIG = {"cluster": {"address": "none", "grpc_port": 0, "http_port": 0}}
READY = r"^OpenAI's interface at (\S+)$"


class Arguments(argparse.Namespace):
    data: Path
    limit: int
    max_tokens: int
    kinds: str


@dataclass(slots=True)
class Tally:
    """How answers of one kind ended. `invalid`: those that ended by themselves and are not what was asked for."""

    ends: Counter[str] = field(default_factory=Counter)
    invalid: list[str] = field(default_factory=list)


def asked_for(line: dict[str, Any], calls: bool) -> dict[str, Any]:
    """What a request asks for beside its messages."""
    if calls:
        return {"tools": line["tools"], "tool_choice": "required"}
    function = line["tools"][0]["function"]
    schema = {"name": function["name"], "schema": function["parameters"]}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def problem(line: dict[str, Any], message: Any) -> str:  # noqa: ANN401 - of the openai package
    """What is wrong with an answer; "" for nothing."""
    functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in line["tools"]}
    try:
        if message.tool_calls is None:
            jsonschema.validate(json.loads(message.content), line["tools"][0]["function"]["parameters"])
        for call in message.tool_calls or ():
            jsonschema.validate(json.loads(call.function.arguments), functions[call.function.name])
    except (ValueError, KeyError, jsonschema.ValidationError) as error:
        return f"{line['id']}: {type(error).__name__}: {error}"
    return ""


async def ask(
    client: AsyncOpenAI, line: dict[str, Any], calls: bool, temperature: float, max_tokens: int, tally: Tally
) -> None:
    answer = await client.chat.completions.create(
        model="",
        messages=line["messages"],
        temperature=temperature,
        seed=1,
        max_tokens=max_tokens,
        **asked_for(line, calls),
    )
    choice = answer.choices[0]
    tally.ends[choice.finish_reason] += 1
    if choice.finish_reason != "length":
        assert bool(choice.message.tool_calls) == calls, f"{line['id']}: {choice.message}"
        tally.invalid += filter(None, [problem(line, choice.message)])


async def main(options: Arguments) -> dict[str, Tally]:
    with options.data.open() as file:
        lines = [json.loads(line) for line in islice(file, options.limit)]
    found: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "tandem.yaml"
        config.write_text(json.dumps(CONFIG))
        server = Server([sys.executable, "-m", "cluster.cli", "serve", "--config", str(config)], READY)
        async with running(server) as url, AsyncOpenAI(base_url=url, api_key="none", timeout=3600) as client:
            turn = asyncio.Semaphore(AT_ONCE)
            for calls in (kind == "calls" for kind in options.kinds.split(",")):
                for temperature in (0.0, 1.0):
                    name = f"{'calls' if calls else 'object'}, {'sampled' if temperature else 'greedy'}"
                    tally = found[name] = Tally()

                    async def one(line: dict[str, Any], ways: tuple[bool, float, Tally]) -> None:
                        calls, temperature, tally = ways
                        async with turn:
                            await ask(client, line, calls, temperature, options.max_tokens, tally)

                    await asyncio.gather(*(one(line, (calls, temperature, tally)) for line in lines))
    return found


def show(found: dict[str, Tally]) -> None:
    table = Table("", "ended by itself", "cut off", "not valid")
    for name, tally in found.items():
        cut = tally.ends["length"]
        table.add_row(name, str(tally.ends.total() - cut), str(cut), str(len(tally.invalid)))
    Console().print(table)
    for tally in found.values():
        print(*tally.invalid, sep="\n", end="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--kinds", default="object,calls")
    show(asyncio.run(main(parser.parse_args(namespace=Arguments()))))
