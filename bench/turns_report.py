"""What servers that took turns attained: tables in Markdown, and plain values."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench.engine_processes import ArmFailed
from bench.plots import Panel, draw_panels, image
from bench.report import stamp, table, write_section
from bench.turns import Arm, Store, Turns, take_turns
from cluster.loadtest.point import Point
from cluster.loadtest.record import Record
from cluster.loadtest.results import describe
from cluster.loadtest.summary import percentiles
from engine.objectives import Objectives

ATTAINMENT = 0.9


def pairs_of(texts: Sequence[str]) -> list[Objectives]:
    """ "1500,90": TTFT and TPOT in milliseconds."""
    numbers = [[float(number) / 1e3 for number in text.split(",")] for text in texts]
    return [Objectives(ttft_s, tpot_s) for ttft_s, tpot_s in numbers]


def publish(turns: Turns, folder: Path, page: Callable[[Turns, Store], str], section: str) -> None:
    """Takes the turns that are missing in `folder`, prints the page, and writes what there is. `section`: of
    docs/performance.md, to replace; "" for none."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / "runs.jsonl")
    console = Console(stderr=True, highlight=False)
    try:
        asyncio.run(take_turns(turns, store, lambda text: console.print(text, markup=False)))
    except ArmFailed as failure:
        raise SystemExit(str(failure)) from None
    text = page(turns, store)
    (folder / "results.json").write_text(json.dumps(as_json(turns, store)) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    draw_panels(panels_of(turns, store), folder / "attainment.png")
    print(text)
    if section:
        picture = image(section, panels_of(turns, store), "attainment against rate")
        write_section(section, f"{text}\n\n{picture}\n\n{stamp(f'{os.cpu_count()} CPUs')}")


def panels_of(turns: Turns, store: Store) -> list[Panel]:
    """Attainment against rate, a panel for each pair of objectives."""
    panels = []
    for pair in turns.pairs:
        lines = {
            arm.name: [(point.rate_rps, point.attainment) for point in points_of(turns, store, arm, pair)]
            for arm in turns.arms
        }
        panels.append(Panel(describe(pair), lines))
    return panels


def best_rate(turns: Turns, store: Store, arm: Arm, objectives: Objectives) -> float:
    """The highest rate at which the runs of all seeds together attain enough; 0.0 for none."""
    points = points_of(turns, store, arm, objectives)
    return max((point.rate_rps for point in points if point.attainment >= ATTAINMENT), default=0.0)


def points_of(turns: Turns, store: Store, arm: Arm, objectives: Objectives) -> list[Point]:
    """Those that all seeds have run, by rate. Rates that a seed did not reach, because a lower one had failed, are
    missing."""
    found = (store.point(arm, rate_rps, objectives, turns.seeds) for rate_rps in turns.all_rates_rps)
    return [point for point in found if point is not None]


def is_split(record: Record) -> bool:
    """Whether, by its receipt, a request was prefilled by one worker and decoded by another."""
    receipt = record.receipt or {}
    prefill = receipt.get("prefill_worker", "")
    return bool(prefill) and prefill != receipt.get("decode_worker", "")


def attainment_table(turns: Turns, store: Store, objectives: Objectives) -> str:
    """Rates down, arms across: the share of all requests, and of each seed's in brackets."""
    rows = []
    for rate_rps in turns.all_rates_rps:
        row = [f"{rate_rps:g}"]
        for arm in turns.arms:
            point = store.point(arm, rate_rps, objectives, turns.seeds)
            row.append("–" if point is None else _shares(point))
        rows.append(row)
    return table(["req/s", *(arm.name for arm in turns.arms)], rows)


def best_table(turns: Turns, store: Store) -> str:
    """Objectives down, arms across: the highest rate that attains enough."""
    rows = [
        [describe(pair), *(f"{best_rate(turns, store, arm, pair):g}" for arm in turns.arms)] for pair in turns.pairs
    ]
    return table([f"req/s with ≥ {ATTAINMENT:.0%}", *(arm.name for arm in turns.arms)], rows)


def latency_table(turns: Turns, store: Store, objectives: Objectives) -> str:
    """Each arm at its best rate, or at its lowest where none attains enough."""
    heads = ["arm", "req/s", "TTFT p50 / p90", "TPOT p50 / p90", "ITL p99", "split", "ITL p99 of these", "rejected"]
    rows = []
    for arm in turns.arms:
        points = points_of(turns, store, arm, objectives)
        if not points:
            continue
        best = best_rate(turns, store, arm, objectives)
        point = next((point for point in points if point.rate_rps == best), points[0])
        summary, values = point.summary, split_values(point)
        rows.append(
            [
                arm.name,
                f"{point.rate_rps:g}",
                *(
                    "–" if times is None else f"{times.p50:.0f} / {times.p90:.0f}"
                    for times in (summary.ttft_ms, summary.tpot_ms)
                ),
                "–" if summary.itl_ms is None else f"{summary.itl_ms.p99:.0f}",
                f"{values['split_share']:.0%}",
                "–" if values["split_itl_p99_ms"] is None else f"{values['split_itl_p99_ms']:.0f}",
                str(summary.ending.get("rejected", 0)),
            ]
        )
    return table(heads, rows)


def unloaded_table(turns: Turns, store: Store) -> str:
    """Medians of requests that had the server to themselves, in milliseconds."""
    rows = []
    for arm in turns.arms:
        times = unloaded_values(store, arm)
        rows.append([arm.name, *("–" if value is None else f"{value:.1f}" for value in times.values())])
    return table(["unloaded", "TTFT (ms)", "TPOT (ms)"], rows)


def unloaded_values(store: Store, arm: Arm) -> dict[str, float | None]:
    records = store.unloaded(arm)
    ttft_s = [record.ttft_s for record in records if record.ttft_s is not None]
    tpot_s = [record.tpot_s for record in records if record.tpot_s is not None]
    return {
        "ttft_ms": 1e3 * median(ttft_s) if ttft_s else None,
        "tpot_ms": 1e3 * median(tpot_s) if tpot_s else None,
    }


def split_values(point: Point) -> dict[str, Any]:
    """How many answered requests were disaggregated, and the gaps between the tokens of these."""
    answered = [record for run in point.runs for record in run.records if record.ending == "answered"]
    split = [record for record in answered if is_split(record)]
    gaps = percentiles(gap_s for record in split for gap_s in record.gaps_s)
    return {
        "split_share": len(split) / len(answered) if answered else 0.0,
        "split_itl_p99_ms": None if gaps is None else gaps.p99,
    }


def as_json(turns: Turns, store: Store) -> dict[str, Any]:
    """Every point's figures, and the best rates."""
    pairs = []
    for pair in turns.pairs:
        arms: dict[str, Any] = {}
        for arm in turns.arms:
            points = points_of(turns, store, arm, pair)
            arms[arm.name] = {
                "best_rate_rps": best_rate(turns, store, arm, pair),
                "points": [_point(point) for point in points],
            }
        pairs.append({"ttft_s": pair.ttft_s, "tpot_s": pair.tpot_s, "arms": arms})
    return {
        "seeds": list(turns.seeds),
        "requests": turns.load.count,
        "unloaded": {arm.name: unloaded_values(store, arm) for arm in turns.arms},
        "pairs": pairs,
    }


def _point(point: Point) -> dict[str, Any]:
    by_seed = {str(seed): share for seed, share in point.attainment_by_seed.items()}
    return {"rate_rps": point.rate_rps, "by_seed": by_seed, **split_values(point), **point.summary.as_json()}


def _shares(point: Point) -> str:
    seeds: Sequence[float] = list(point.attainment_by_seed.values())
    return f"{point.attainment:.2f} ({' '.join(f'{share:.2f}' for share in seeds)})"
