"""`python -m bench.device_files [--write]`: makes the packaged device profiles and says how far off they are.

Reads the measured operators of ../shared/data/profiles/op_db, fits each device on 80 % of the rows and judges by the
rest, through the very text that is packaged. Two tables: rows held out at random; and matrix products of shapes that
the grid does not have. `--write` writes cluster/planning/profiles, with l4 and cpu from published rates.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.device_fit import (
    Silicon,
    attention_s,
    fit_attention,
    fit_collectives,
    fit_gemm,
    gemm_process,
    log_ratios,
)
from bench.gaussian_process import Floats
from bench.operator_rows import COLLECTIVES, DEVICES, OP_DB, OPERATORS, SEED, Rows, read_rows
from bench.published_devices import CPU, L4
from cluster.planning.device_profile import PACKAGED, DeviceProfile, profile_json, profile_of
from cluster.planning.operators import DecodeAttention, PrefillAttention, Roofline

LICENCE = "Apache-2.0; operator latencies: Copyright (c) NVIDIA Corporation & affiliates, AIConfigurator"
# In the second table every fourth n and k inside the grid goes, in turn.
FOLDS = 4
EDGE = 8192
# Rows of each device and operator that --sample writes.
SAMPLE_ROWS = 80


@dataclass(frozen=True, slots=True)
class Device:
    """What the rows do not say. Memory, its published bandwidth and the link to other nodes (one way, per GPU) as
    AIConfigurator's system files have them; `nvlink_bytes_s` is measured: NCCL between two GPUs."""

    silicon: Silicon
    memory_bytes: int
    memory_bytes_s: float
    network_bytes_s: float
    versions: str


KNOWN = {
    "h200": Device(
        Silicon(132, nccl_from_bytes=64 << 20), 151397597184, 4.8e12, 50e9, "vLLM 0.24.0, NCCL 2.29.2 or 2.27.3"
    ),
    "h100": Device(
        Silicon(132, nccl_from_bytes=64 << 20), 85899345920, 3.35e12, 50e9, "vLLM 0.24.0, NCCL 2.29.2 or 2.27.3"
    ),
    "a100-80g": Device(
        Silicon(108, 0.6, nccl_from_bytes=8 << 20), 85899345920, 2.039e12, 25e9, "vLLM 0.14.0, NCCL 2.29.2 or 2.27.3"
    ),
    "l40s": Device(
        Silicon(142, 0.6, cache_bytes=96e6, cached_weights=8e6),
        48305799168,
        8.64e11,
        50e9,
        "vLLM 0.24.0, NCCL 2.29.2 or 2.27.3",
    ),
}
# Of AIConfigurator, too: operators that only move bytes reach this share of the published bandwidth, and cost this.
COPY_SHARE, COPY_LATENCY_S = 0.8, 3e-6


def fit_device(name: str, rows: dict[str, Rows]) -> DeviceProfile:
    """The profile of a device from its rows to fit, by operator."""
    device = KNOWN[name]
    collective_rows = Rows(
        np.concatenate([rows["custom_allreduce"].columns, rows["nccl"].columns]),
        np.concatenate([rows["custom_allreduce"].seconds, rows["nccl"].seconds]),
    )
    link_bytes_s = measured_link(rows["nccl"])
    prefill = fit_attention(PrefillAttention, rows["context_attention"], device.silicon)
    decode = fit_attention(DecodeAttention, rows["generation_attention"], device.silicon)
    assert isinstance(prefill, PrefillAttention)
    assert isinstance(decode, DecodeAttention)
    gemm = fit_gemm(rows["gemm"], device.silicon)
    return DeviceProfile(
        name=name,
        source=(
            f"Fitted by `python -m bench.device_files` (seed {SEED}) to operator latencies measured by NVIDIA "
            f"AIConfigurator, package aiconfigurator-core 0.12.0: {device.versions}, bfloat16. memory_copy, "
            "memory_bytes and network_bytes_s are as its system files have them; nvlink_bytes_s is NCCL's rate between "
            "two GPUs."
        ),
        licence=LICENCE,
        memory_bytes=device.memory_bytes,
        element_bytes=2,
        nvlink_bytes_s=float(f"{link_bytes_s:.3g}"),
        network_bytes_s=device.network_bytes_s,
        gemm=gemm,
        prefill_attention=prefill,
        decode_attention=decode,
        collectives=fit_collectives(collective_rows, link_bytes_s, device.silicon),
        memory_copy=Roofline(gemm.roofline.flops_s, COPY_SHARE * device.memory_bytes_s, COPY_LATENCY_S),
    )


def measured_link(nccl: Rows) -> float:
    """Bytes per second from one GPU to one other: the fastest all-gather between two, each sending half of the size."""
    kinds, ranks, sizes = nccl.columns.T
    two = (kinds == COLLECTIVES.index("nccl_all_gather")) & (ranks == 2)
    return float((sizes[two] / 2 / nccl.seconds[two]).max())


def predictions(profile: DeviceProfile, operator: str, rows: Rows) -> Floats:
    """What a profile says for each row."""
    if operator == "gemm":
        return np.array([profile.gemm_s(int(m), int(n), int(k)) for m, n, k in rows.columns])
    if operator == "context_attention":
        return np.array([attention_s(profile.prefill_attention, row) for row in rows.columns.tolist()])
    if operator == "generation_attention":
        return np.array([attention_s(profile.decode_attention, row) for row in rows.columns.tolist()])
    return np.array(
        [profile.collective_s(COLLECTIVES[int(kind)], size, int(ranks)) for kind, ranks, size in rows.columns]
    )


def errors(predicted: Floats, rows: Rows) -> Floats:
    return np.asarray(np.abs(predicted / rows.seconds - 1))


def shown(each: Floats) -> str:
    return f"{np.median(each):.1%} / {np.quantile(each, 0.9):.1%}"


def unseen_shapes(fit: Rows, silicon: Silicon) -> tuple[Floats, Floats, Floats]:
    """Errors on matrix products whose (n, k) was never measured: (each (n, k) left out alone and predicted as a grid
    point, every fourth n and k left out of rows and grid and interpolated, all n beyond EDGE left out and held)."""
    gemm = fit_gemm(fit, silicon)
    _, n, k = fit.columns.T
    pairs = np.unique(fit.columns[:, 1:], axis=0, return_inverse=True)[1].ravel()
    logs = gemm_process(gemm, fit, silicon).without_group(pairs)
    alone = np.asarray(np.abs(np.exp(logs - log_ratios(gemm.roofline_s, fit)) - 1))
    every_m, every_n, every_k = (sorted(set(column)) for column in fit.columns.T)
    between = []
    for fold in range(FOLDS):
        kept = [
            [x for i, x in enumerate(axis) if i % FOLDS != fold or x in (axis[0], axis[-1])]
            for axis in (every_n, every_k)
        ]
        seen = np.isin(n, kept[0]) & np.isin(k, kept[1])
        between.append(_refitted_errors(fit, seen, silicon, (every_m, *kept)))
    inside = n <= EDGE
    beyond = _refitted_errors(fit, inside, silicon, (every_m, [x for x in every_n if x <= EDGE], every_k))
    return alone, np.concatenate(between), beyond


def _refitted_errors(
    rows: Rows, seen: npt.NDArray[np.bool_], silicon: Silicon, axes: tuple[list[float], ...]
) -> Floats:
    """Errors on the rows that are not `seen`, of a fit to those that are."""
    gemm = fit_gemm(rows.take(np.flatnonzero(seen)), silicon, axes)
    unseen = rows.take(np.flatnonzero(~seen))
    return errors(np.array([gemm.seconds(int(m), int(n), int(k)) for m, n, k in unseen.columns]), unseen)


def sample(rows: Rows) -> list[list[float]]:
    """The first rows, each its columns and microseconds."""
    columns = rows.columns[:SAMPLE_ROWS].tolist()
    return [[*row, float(f"{s * 1e6:.5g}")] for row, s in zip(columns, rows.seconds, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the packaged profiles")
    parser.add_argument("--device", choices=DEVICES, action="append", help="only this one; may be repeated")
    parser.add_argument("--no-unseen", action="store_true", help="leave out the second table")
    parser.add_argument("--sample", type=Path, metavar="FILE", help="write some of the held-out rows, for a test")
    arguments = parser.parse_args()
    if not OP_DB.is_dir():
        sys.exit(f"no measured operators: {OP_DB.name} is not beside this checkout")
    held_out_table, unseen_table = [], []
    samples: dict[str, dict[str, list[list[float]]]] = {}
    for name in arguments.device or DEVICES:
        split = {operator: read_rows(name, operator).split() for operator in OPERATORS}
        text = profile_json(fit_device(name, {operator: fit for operator, (fit, _) in split.items()}))
        profile = profile_of(json.loads(text))
        cells = []
        for operator, (_, held_out) in split.items():
            each = errors(predictions(profile, operator, held_out), held_out)
            cells.append(f"{shown(each)} ({len(each)})")
        samples[name] = {operator: sample(held_out) for operator, (_, held_out) in split.items()}
        held_out_table.append(f"| {name} | " + " | ".join(cells) + " |")
        print(held_out_table[-1], f"{len(text) / 1000:.0f} KB", file=sys.stderr)
        if not arguments.no_unseen:
            alone, between, beyond = unseen_shapes(split["gemm"][0], KNOWN[name].silicon)
            unseen_table.append(f"| {name} | {shown(alone)} | {shown(between)} | {shown(beyond)} |")
        if arguments.write:
            (PACKAGED / f"{name}.json").write_text(text, encoding="utf-8")
    if arguments.sample:
        arguments.sample.write_text(json.dumps(samples, separators=(",", ":")) + "\n", encoding="utf-8")
    print("Median / p90 of |predicted - measured| / measured on rows not used in the fit (rows):\n")
    print(f"| device | {' | '.join(OPERATORS)} |\n|---|" + "---|" * len(OPERATORS))
    print("\n".join(held_out_table))
    if unseen_table:
        print("\nMatrix products of (n, k) that were never measured:\n")
        print(f"| device | (n, k) left out | every fourth n and k left out, between grid points | n > {EDGE}, held |")
        print("|---|---|---|---|\n" + "\n".join(unseen_table))
    if arguments.write:
        for profile in (L4, CPU):
            (PACKAGED / f"{profile.name}.json").write_text(profile_json(profile), encoding="utf-8")


if __name__ == "__main__":
    main()
