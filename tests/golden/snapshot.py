"""The golden snapshot's records, and which prompts they are made from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.tokenizer import Tokenizer

PATH = Path(__file__).parents[1] / "data" / "golden_smollm2.jsonl"
PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "prompts"
SEED = 20250607
NEW_TOKENS = 48
# Long documents are cut to this many characters: some 600 tokens.
DOCUMENT_CHARS = 2200
# File → how many prompts to draw from it. Together 64.
DRAWS = {
    "humaneval": 12,
    "mt_bench": 10,
    "vicuna_bench": 8,
    "gsm8k_test": 10,
    "bfcl_tools": 10,
    "longdoc": 6,
}
SONNETS = 8


@dataclass(frozen=True, slots=True)
class Golden:
    """One prompt and its 48 greedy tokens. `gaps[t]`: how far the best logit was above the second when t was drawn."""

    id: str
    source: str
    token_ids: list[int]
    expected: list[int]
    gaps: list[float]


def read() -> list[Golden]:
    return [Golden(**json.loads(line)) for line in PATH.read_text(encoding="utf-8").splitlines()]


def write(records: list[Golden]) -> None:
    PATH.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")


def prompts(tokenizer: Tokenizer) -> Iterator[tuple[str, str, list[int]]]:
    """(id, source, token ids) of the 64 prompts, the same in every run."""
    rng = random.Random(SEED)
    for source, count in DRAWS.items():
        lines = (PROMPTS / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in rng.sample(lines, count):
            record = json.loads(line)
            yield record["id"], source, _encode(tokenizer, record)
    sonnet_lines = (PROMPTS / "sonnet.txt").read_text(encoding="utf-8").splitlines()
    for number in range(SONNETS):
        chosen = rng.sample(sonnet_lines, rng.randrange(2, 24))
        yield f"sonnet/{number}", "sonnet", tokenizer.encode("\n".join(chosen))


def _encode(tokenizer: Tokenizer, record: dict[str, Any]) -> list[int]:
    if "prompt" in record:
        return tokenizer.encode(record["prompt"])
    messages = [{**message, "content": message["content"][:DOCUMENT_CHARS]} for message in record["messages"]]
    if "tools" in record:
        messages.insert(0, {"role": "system", "content": "You may call: " + json.dumps(record["tools"])})
    return tokenizer.encode_chat(messages)
