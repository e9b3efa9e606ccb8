"""`tandem bench`: sends a load to running services, and says which share of it met its objectives.

Flags are the fields of `BenchOptions` (cluster/loadtest/options.py). Prints a report, or with --json one object (see
cluster/loadtest/results.py); --out writes results.json, report.md and the pictures.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from cluster.loadtest.load import Load
from cluster.loadtest.markdown import page
from cluster.loadtest.options import (
    DEFAULT_OUTPUT_TOKENS,
    BenchOptions,
    make_load,
    make_plan,
    make_targets,
)
from cluster.loadtest.prompts import FilePrompts, PromptSource, RandomTokens, RandomWords
from cluster.loadtest.results import Results, as_json, read_results, rejudged
from cluster.loadtest.screen import Screen
from cluster.loadtest.study import Study
from cluster.loadtest.target import Target, TargetFacts
from cluster.prompt_file import PromptLine, read_prompt_file
from engine.errors import ConfigError


async def bench(options: BenchOptions) -> None:
    """Runs the study that `options` ask for, and prints it. Cancelled, it still writes what it has.

    Raises ConfigError naming the flag that cannot be.
    """
    options.check()
    screen = Screen(Console(stderr=True, highlight=False), is_quiet=options.as_json)
    if options.reslo is not None:
        results = rejudged(read_results(options.reslo), options.objectives, options.scales)
        await asyncio.to_thread(_publish, results, options)
        return
    # What is wrong with files is said before anybody is called.
    load = make_load(options)
    lines = _read_prompts(options.prompts) if options.prompts is not None else []
    async with AsyncExitStack() as stack:
        targets = make_targets(options)
        for target in targets:
            stack.push_async_callback(target.close)
        facts = {target.name: await target.facts() for target in targets}
        lengths = [each.max_context for each in facts.values() if each.max_context is not None]
        if not options.prompts:
            load = load.fitting(min(lengths, default=None))
        plan = make_plan(options, load)
        source = _make_source(options, lines, list(facts.values()))
        # uvloop's clock tells whole milliseconds, and stands still while callbacks run.
        study = Study(plan, load, source, targets, screen, clock=time.perf_counter)
        described = {target.name: _describe_target(target, facts[target.name]) for target in targets}
        is_whole = False
        try:
            await study.run()
            is_whole = True
        finally:
            if is_whole or study.points:
                results = Results(
                    datetime.date.today().isoformat(),
                    options.objectives,
                    options.attainment,
                    _describe_load(options, load),
                    described,
                    tuple(study.points),
                    tuple(study.goodputs),
                    tuple(_notes(options, load)),
                    is_whole,
                )
                _publish(results, options)


def _make_source(options: BenchOptions, lines: Sequence[PromptLine], facts: Sequence[TargetFacts]) -> PromptSource:
    if lines:
        return FilePrompts(lines, random.Random(f"order {options.seed}"))
    # Ids are exact; a server that does not tell its vocabulary may not take them.
    sizes = [each.vocab_size for each in facts]
    known = [size for size in sizes if size is not None]
    if options.prompt_form == "ids" or (options.prompt_form == "auto" and len(known) == len(sizes)):
        return RandomTokens(min(known, default=None))
    return RandomWords()


def _read_prompts(path: Path) -> list[PromptLine]:
    try:
        return read_prompt_file(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--file", "--prompts", 1)) from None


def _describe_load(options: BenchOptions, load: Load) -> dict[str, Any]:
    by_trace = options.trace is not None
    process = load.process
    return {
        "requests": load.count,
        "seeds": list(range(options.seed, options.seed + options.seeds)),
        "arrivals": "trace" if process is None else process.kind,
        "cv": process.cv if process is not None and process.kind == "gamma" else None,
        "trace": options.trace.name if options.trace is not None else None,
        "prompts": options.prompts.name if options.prompts is not None else None,
        "input_tokens": None if by_trace or options.prompts else load.rows[0].prompt_tokens,
        "output_tokens": options.output_tokens or (None if by_trace else DEFAULT_OUTPUT_TOKENS),
        "ignore_eos": options.ignore_eos,
        "left_out": load.left_out or None,
    }


def _describe_target(target: Target, facts: TargetFacts) -> dict[str, Any]:
    return {"url": target.url, "model": facts.model, "acts_on_objectives": target.acts_on_objectives}


def _notes(options: BenchOptions, load: Load) -> list[str]:
    if not load.left_out:
        return []
    return [f"{load.left_out} of {len(load.rows)} rows are longer than the model's context and were left out"]


def _publish(results: Results, options: BenchOptions) -> None:
    pictures: list[str] = []
    if options.out is not None:
        from cluster.loadtest.plots import save_plots

        try:
            options.out.mkdir(parents=True, exist_ok=True)
            whole = json.dumps(as_json(results, with_gaps=True))
            (options.out / "results.json").write_text(whole + "\n", encoding="utf-8")
            pictures = save_plots(results, options.out)
            (options.out / "report.md").write_text(page(results, pictures), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {options.out}: cannot be written: {error.strerror}") from None
    if options.as_json:
        print(json.dumps(as_json(results, with_gaps=False)))
    else:
        Console(highlight=False).print(Markdown(page(results, [])))
