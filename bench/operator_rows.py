"""Measured operator latencies of ../shared/data/profiles/op_db, split by a seed into rows to fit and rows to judge by.

The rows are NVIDIA AIConfigurator's (Apache-2.0). What their columns do not say, from its collectors: `message_size`
counts elements, of 2 bytes for custom_allreduce. For nccl each (collective, ranks) is listed twice, first with 2-byte
elements, then with 1-byte ones, each list by rising size: a size not above the one before starts the second list. That
reading is checked by the rows themselves: an all-gather of as many bytes takes as long in either list.
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

OP_DB = Path(__file__).parents[2] / "shared" / "data" / "profiles" / "op_db"
DEVICES = ("h200", "h100", "a100-80g", "l40s")
OPERATORS = ("gemm", "context_attention", "generation_attention", "custom_allreduce", "nccl")
HELD_OUT_SHARE = 0.2
SEED = 2026


@dataclass(frozen=True, slots=True)
class Rows:
    """One device's rows of one operator: its inputs as columns, and what was measured.

    gemm: m, n, k. Attention: batch, tokens (new ones, or the context with the new one), num_heads, num_kv_heads,
    head_dim. Collectives: kind (index into COLLECTIVES), ranks, bytes.
    """

    columns: Floats
    seconds: Floats

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, chosen: npt.NDArray[np.intp]) -> Rows:
        return Rows(self.columns[chosen], self.seconds[chosen])

    def split(self, seed: int = SEED) -> tuple[Rows, Rows]:
        """(rows to fit, rows held out), by the seed alone."""
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = round(len(self) * HELD_OUT_SHARE)
        return self.take(order[held_out:]), self.take(order[:held_out])


# Kinds of collective and the bytes of an element, where it matters: sums of 1-byte elements take another path in NCCL.
COLLECTIVES = (
    "all_reduce",
    "nccl_all_gather",
    "nccl_alltoall",
    "nccl_all_reduce",
    "nccl_reduce_scatter",
    "nccl_all_reduce_1_byte",
    "nccl_reduce_scatter_1_byte",
)


def read_rows(device: str, operator: str, folder: Path = OP_DB) -> Rows:
    with gzip.open(folder / f"{device}.{operator}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    if operator == "gemm":
        columns = [[float(record[key]) for key in ("m", "n", "k")] for record in records]
    elif operator == "custom_allreduce":
        columns = [[0.0, float(record["num_gpus"]), 2 * float(record["message_size"])] for record in records]
    elif operator == "nccl":
        columns = _nccl_columns(records)
    else:
        columns = [_attention_columns(record) for record in records]
    seconds = [float(record["latency_ms"]) * 1e-3 for record in records]
    return Rows(np.array(columns), np.array(seconds))


def _attention_columns(record: dict[str, str]) -> list[float]:
    new, step = float(record["isl"]), float(record["step"])
    assert new == 1 or step == 0, "prefill rows have no context, decode rows one new token"
    heads = [float(record[key]) for key in ("num_heads", "num_key_value_heads", "head_dim")]
    return [float(record["batch_size"]), new + step, *heads]


def _nccl_columns(records: list[dict[str, str]]) -> list[list[float]]:
    columns = []
    before: tuple[str, str, float] = ("", "", 0.0)
    is_second = False
    for record in records:
        name, ranks, elements = record["op_name"], record["num_gpus"], float(record["message_size"])
        is_second = (name, ranks) == before[:2] and (is_second or elements <= before[2])
        kind = f"nccl_{name}"
        if is_second and "reduce" in name:
            kind += "_1_byte"
        columns.append([float(COLLECTIVES.index(kind)), float(ranks), elements * (1 if is_second else 2)])
        before = (name, ranks, elements)
    return columns
