"""What the leader says to the other ranks, as plain values that msgpack can carry.

Sampling happens on the leader alone, so of a row's SampleSpec only that there is one is told.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

from engine.batch import Batch, Row, SampleSpec
from engine.ranks import Message
from engine.sampling import SamplingParams

# Its rows' logits are wanted; what is drawn from them is the leader's business.
WANTED = SampleSpec(SamplingParams(temperature=0.0), 0, 0)
# Stands for tokens that only the leader knows, and broadcasts when it embeds them.
UNKNOWN_TOKEN = 0
STOP: Message = {"kind": "stop"}


def batch_message(batch: Batch) -> Message:
    return {
        "kind": "batch",
        "rows": [
            (
                list(row.token_ids) if row.follows is None else [UNKNOWN_TOKEN],
                row.start,
                list(row.block_ids),
                row.sample is not None,
            )
            for row in batch.rows
        ],
        "copies": list(batch.copies),
        "only_leader_knows_tokens": any(row.follows is not None for row in batch.rows),
    }


def batch_of(message: Message) -> tuple[Batch, bool]:
    """The batch, and whether only the leader knows all of its tokens."""
    rows, copies = cast(Any, message["rows"]), cast(Any, message["copies"])
    return Batch(
        tuple(
            Row("", token_ids, start, block_ids, WANTED if is_sampled else None)
            for token_ids, start, block_ids, is_sampled in rows
        ),
        tuple((source, target) for source, target in copies),
    ), bool(message["only_leader_knows_tokens"])


@dataclass(frozen=True, slots=True)
class Export:
    """Send the KV of these blocks; `layers` by the rank's own count. As `Runner.export_blocks`."""

    block_ids: list[int]
    first_layer: int
    end_layer: int
    block_tokens: int

    def message(self) -> Message:
        return {"kind": "export", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Import:
    """Write the `byte_count` bytes that follow, and say when it is done. As `Runner.import_blocks`."""

    block_ids: list[int]
    first_slot: int
    first_layer: int
    end_layer: int
    block_tokens: int
    dtype: str
    byte_count: int

    def message(self) -> Message:
        return {"kind": "import", **asdict(self)}


def request_of(message: Message) -> Export | Import | None:
    """What a message on the blocks' group asks for; None: to stop."""
    fields: Any = {key: value for key, value in message.items() if key != "kind"}
    match message["kind"]:
        case "export":
            return Export(**fields)
        case "import":
            return Import(**fields)
    return None
