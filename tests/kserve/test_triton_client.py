"""Triton's own client as the judge."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.cluster.serving import ANSWER, TOKENIZER
from tests.kserve.service import serving

PROGRAM = Path(__file__).with_name("triton_program.py")


async def test_tritonclient() -> None:
    async with serving() as service:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(PROGRAM), service.address, "tiny", stdout=-1, stderr=-1
        )
        async with asyncio.timeout(120):
            printed, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    seen = json.loads(printed)
    text = TOKENIZER.decode(ANSWER[:6])
    assert (seen["live"], seen["ready"], seen["model ready"], seen["server"]) == (True, True, True, "tandem")
    assert {"text_input", "input_ids", "stream", "sampling_parameters"} <= set(seen["inputs"])
    assert seen["whole"] == {
        "id": "7",
        "text_output": [text],
        "finish_reason": ["length"],
        "output_ids": ANSWER[:6],
        "num_input_tokens": [len(TOKENIZER.encode("One, two,"))],
        "num_output_tokens": [6],
        "sequence_index": [0],
    }
    assert seen["ids"] == ["finish_reason"]
    assert seen["streamed"]["text"] == text
    assert seen["streamed"]["error of b"] == "text_input: got '', expected a prompt of at least one token"
    assert seen["errors"] == [
        ["StatusCode.INVALID_ARGUMENT", "temperature: got -1.0, expected a number in [0, 100]"],
        ["StatusCode.INVALID_ARGUMENT", "text_input: got '2 elements', expected one: shape [1] or [1, 1]"],
        ["StatusCode.NOT_FOUND", "model 'huge' not found; known: tiny"],
    ]
