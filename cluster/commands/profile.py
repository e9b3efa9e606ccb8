"""`tandem profile`: measures the steps of the running device and model, and writes the file that predicts them.

Every command that takes `--profile` takes that file; so does `cluster.profile` of the configuration.
"""

from __future__ import annotations

import asyncio
import platform
import random
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.config import TandemConfig
from cluster.planning.cost_model import CostModel
from cluster.planning.measured_law import MeasuredProfile, measured_worker, profile_json
from cluster.planning.measured_profile import Judged, kind_of, make_profile
from cluster.planning.model_shape import shape_of_model
from cluster.planning.step_law import WorkerFacts
from cluster.planning.step_plan import Limits, plan_steps
from cluster.progress import Progress
from engine.batch import ELEMENT_BYTES
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_source import resolve

if TYPE_CHECKING:
    from engine.engine import Engine

# What measuring may take in all; what is not measured by then is left out.
FULL_S, QUICK_S = 150.0, 24.0
# Largest chunk and batch on a GPU, where the configuration's own are smaller: they take no time there.
GPU_CHUNK, GPU_ROWS = 4096, 256
# Decode batches that the closing table shows, each at this mean context.
SHOWN_ROWS, SHOWN_CONTEXT = (1, 8, 32), 256


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0,2-3" as (0, 2, 3). Raises ConfigError."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise ConfigError(f"--cpus: got {text!r}, expected numbers and ranges such as 0,2-3")
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


async def profile(
    config: TandemConfig,
    out: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    cpus: str | None = None,
    is_quick: bool = False,
    seed: int = 0,
) -> MeasuredProfile:
    """Measures the engine of `config`, with `device`, `threads` and `cpus` in place of its own where given, writes
    `out` and prints how good the fit is.

    Raises ConfigError and what loading a model raises; `out` is then not written.
    """
    given = {"device": device, "threads": threads, "cpus": None if cpus is None else parse_cpus(cpus)}
    engine_config = _replaced(config.engine, {name: value for name, value in given.items() if value is not None})
    config = config.model_copy(update={"engine": engine_config})
    if engine_config.ranks > 1:
        raise ConfigError(f"profile: got an engine of {engine_config.ranks} ranks, expected 1: others are predicted")
    if not await asyncio.to_thread(out.parent.is_dir):
        raise ConfigError(f"--out: {out.parent} is no folder")
    if await asyncio.to_thread(out.is_dir):
        raise ConfigError(f"--out: {out} is a folder, expected the name of a file")
    console = Console(highlight=False)
    progress = Progress(Console(stderr=True))
    async with progress.step("loading the model") as news:
        from engine.engine import load_engine

        files = await asyncio.to_thread(resolve, config.engine.model, news)
        engine = await asyncio.to_thread(load_engine, config.engine, files)
    try:
        measured, judged = await _measure(config, engine, is_quick, seed, progress)
    finally:
        await engine.runner.close()
    try:
        await asyncio.to_thread(out.write_text, profile_json(measured), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    for table in (_error_table(measured, judged), _time_table(measured)):
        console.print(table)
    console.print(f"{out}: written; give it to --profile, or to cluster.profile in the configuration")
    return measured


def _replaced(engine: EngineConfig, given: Mapping[str, object]) -> EngineConfig:
    """Raises ConfigError for a value that cannot be: a mere copy would not look at it."""
    try:
        return EngineConfig.model_validate({**engine.model_dump(), **given})
    except ValidationError as error:
        problem = error.errors()[0]
        name, message = problem["loc"][0], problem["msg"].removeprefix("Input should be ")
        raise ConfigError(f"--{name}: got {problem['input']!r}, expected {message}") from None


async def _measure(
    config: TandemConfig, engine: Engine, is_quick: bool, seed: int, progress: Progress
) -> tuple[MeasuredProfile, list[Judged]]:
    from cluster.planning.measure import Measurement, device_name
    from cluster.planning.measure_loop import measure_loop

    layout, rng = engine.runner.layout, random.Random(seed)
    name = device_name(config.engine.device)
    plan = plan_steps(limits_of(config, engine, is_gpu=name != "cpu"), rng, is_quick)
    measurement = Measurement(engine.runner, engine.model.vocab_size, rng)
    until_s = time.perf_counter() + (QUICK_S if is_quick else FULL_S)
    async with progress.step(f"measuring {len(plan.anchors) + len(plan.held_out)} steps") as news:
        measured = await measurement.run(
            (*plan.anchors, *plan.held_out), until_s, lambda done, of: news(f"measuring: round {done} of {of}")
        )
    async with progress.step("measuring the worker's loop"):
        loop_step_s, loop_row_s = await measure_loop()
    facts = WorkerFacts(
        shape_of_model(engine.model),
        kv_capacity_tokens=layout.num_blocks * layout.block_size,
        element_bytes=ELEMENT_BYTES[layout.dtype],
        loop_step_s=loop_step_s,
        loop_row_s=loop_row_s,
    )
    held_out = set(plan.held_out)
    return make_profile(
        facts,
        name,
        _source(config, is_quick),
        [step for step in measured if step.work not in held_out],
        [step for step in measured if step.work in held_out],
    )


def limits_of(config: TandemConfig, engine: Engine, *, is_gpu: bool) -> Limits:
    """The largest steps that this configuration's workers make; on a GPU also those that other budgets would."""
    layout = engine.runner.layout
    chunk = max(config.prefill.token_budget, config.decode.local_token_budget, GPU_CHUNK if is_gpu else 0)
    rows = max(config.decode.max_batch, GPU_ROWS if is_gpu else 0)
    return Limits(rows, chunk, engine.model.max_context, layout.num_blocks * layout.block_size)


def _source(config: TandemConfig, is_quick: bool) -> str:
    engine = config.engine
    how = "tandem profile --quick" if is_quick else "tandem profile"
    threads = f"{engine.threads or len(engine.cpus) or 'default'} threads"
    return f"{how}, {date.today().isoformat()}, {platform.machine()}, {threads}, {engine.weight_format} weights"


def _error_table(measured: MeasuredProfile, judged: Sequence[Judged]) -> Table:
    title = f"{measured.facts.model.name} on {measured.device}: steps that the fit did not see"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("kind", "steps", "median error", "p90", "worst"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, (median, p90, count) in measured.errors.items():
        worst = max(abs(step.error) for step in judged if kind in ("all", kind_of(step.work)))
        table.add_row(kind, str(count), *(f"{error:.1%}" for error in (median, p90, worst)))
    return table


def _time_table(measured: MeasuredProfile) -> Table:
    cost = CostModel(*measured_worker(measured, "", None, 1, 1, None))
    table = Table(title="what it says", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    for rows in SHOWN_ROWS:
        table.add_row(
            f"decode step, batch {rows}, context {SHOWN_CONTEXT}", f"{cost.decode_s(rows, rows * SHOWN_CONTEXT):.4f} s"
        )
    saturation = cost.saturation_tokens
    table.add_row(f"prompt of {saturation} tokens, the saturation length", f"{cost.prefill_s(saturation):.3f} s")
    table.add_row("the loop around a step, batch 32", f"{cost.loop_s(32) * 1e3:.2f} ms")
    table.add_row("KV capacity", f"{cost.kv_capacity_tokens} tokens")
    return table
