"""Does the emulator say what really happens? The same requests against real workers, and against their emulation.

    python -m bench.emulator_against_reality [--profile F] [--slo 2500,90] [--split-rates 0.7,1.2,1.8,2.6]
        [--colocated-rates …] [--n 100] [--seeds 2] --out FOLDER [--write NAME]

The real model on this machine's CPU, one thread a worker: one prefill and one decode worker, and two colocated ones.
Fitted: the profile (`tandem profile`, measured here first unless --profile brings one), and from one run of each
arrangement at its third rate how much longer steps take beside others on the same machine (bench/scale_fit.py) and
what a message takes (from requests alone). Judged: other runs, with other prompts, lengths and arrivals, at four rates
from light to overload. The emulation gets nothing of these but when each request came and how long it was.

Attainment of each cell, real and emulated, and the goodput that follows: the rate at which attainment crosses 90 %,
on a straight line between rates. FOLDER gets runs.jsonl (an interrupted study goes on from it) and report.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.plots import draw_panels, image
from bench.reality_report import Cell, panels_of, report
from bench.report import stamp, write_section
from bench.scale_fit import Latency, Scales, fit_scales
from bench.servers import running, tandem_server
from bench.turns_report import pairs_of
from cluster.commands.profile import profile
from cluster.config import TandemConfig
from cluster.gateway_cost import role_cost
from cluster.loadtest.load import Load, Process
from cluster.loadtest.play import play
from cluster.loadtest.prompts import RandomTokens
from cluster.loadtest.record import Record, from_json, to_json
from cluster.loadtest.request import LoadRequest
from cluster.loadtest.tandem_target import TandemTarget
from cluster.planning.emulation_result import RequestRecord
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.emulator import emulate
from cluster.planning.trace import Trace, TraceRequest
from cluster.registry import Role
from engine.config import DEFAULT_MODEL
from engine.model_source import resolve
from engine.objectives import NO_OBJECTIVES, Objectives

# Mean lengths, and the standard deviation of their logarithm: neither all alike, nor further apart than a context.
PROMPT_TOKENS, ANSWER_TOKENS, SIGMA = 256, 64, 0.5
LONGEST_PROMPT, LONGEST_ANSWER = 1024, 256
FIT_SEED = 1000
# Of the rates, the one that is fitted: a busy one, or the steps beside others are too few to tell how long they take.
FIT_RATE = 2
ALONE, WARM_UP = 8, 3
TIMEOUT_S = 300.0
# Emulations of a cell, each with other noise: their mean is compared.
NOISE_SEEDS = range(5)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Which workers, and how many messages pass one after the other before a first token is there."""

    name: str
    cluster: dict[str, int]
    hops: int


ARRANGEMENTS = (
    Arrangement("1P + 1D", {"prefill": 1, "decode": 1}, 4),
    Arrangement("2 colocated", {"prefill": 0, "decode": 0, "colocated": 2}, 2),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """What one run told: how much longer steps take than alone, and seconds of a message."""

    scales: Scales
    message_s: float


class Store:
    """Real runs by name, kept in a file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.runs: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                self.runs[values["name"]] = values

    def add(self, name: str, records: Sequence[Record]) -> None:
        values = {"name": name, "records": [to_json(record, with_gaps=False) for record in records]}
        self.runs[name] = values
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def records(self, name: str) -> list[Record]:
        return [from_json(values) for values in self.runs[name]["records"]]


class Study:
    """Both arrangements, their real runs and their emulations."""

    def __init__(self, arguments: argparse.Namespace, config: TandemConfig, objectives: Objectives) -> None:
        self._arguments = arguments
        self._config = config
        self._objectives = objectives
        files = resolve(config.engine.model)
        roles: tuple[Role, ...] = ("prefill", "decode")
        self._costs = {role: role_cost(config, files, role) for role in roles}
        self._store = Store(arguments.out / "runs.jsonl")
        self._say = Console(stderr=True, highlight=False).print

    def cells(self) -> list[Cell]:
        found = []
        for arrangement in ARRANGEMENTS:
            rates = self._rates(arrangement)
            if missing := [name for name in self._names(arrangement, rates) if name not in self._store.runs]:
                self._say(f"{arrangement.name}: {len(missing)} real runs")
                asyncio.run(self._play_all(arrangement, rates))
            fit = self._fit(arrangement)
            self._say(f"{arrangement.name}: {fit}")
            found += [self._cell(arrangement, rate, fit) for rate in rates]
        return found

    # ── real ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _play_all(self, arrangement: Arrangement, rates: Sequence[float]) -> None:
        config = self._arranged(arrangement)
        path = (self._arguments.out / f"{arrangement.name.replace(' ', '')}.json").resolve()
        path.write_text(config.model_dump_json(), encoding="utf-8")
        async with running(tandem_server(path)) as address:
            target = TandemTarget("tandem", address)
            try:
                vocab_size = (await target.facts()).vocab_size
                source = RandomTokens(vocab_size)
                await self._play_alone(arrangement, target, source)
                judged = itertools.product(rates, range(self._arguments.seeds))
                for rate, seed in [(rates[FIT_RATE], FIT_SEED), *judged]:
                    name = self._name(arrangement, rate, seed)
                    if name in self._store.runs:
                        continue
                    requests = self._requests(rate, seed, source)
                    records = await play(target, requests, objectives=self._objectives, timeout_s=TIMEOUT_S)
                    self._store.add(name, records)
                    self._say(f"{name}: {attainment(records, self._objectives):.3f}")
            finally:
                await target.close()

    async def _play_alone(self, arrangement: Arrangement, target: TandemTarget, source: RandomTokens) -> None:
        """Requests that have the service to themselves; the first warm it up."""
        rng, records = random.Random("alone"), list[Record]()
        is_known = f"{arrangement.name} alone" in self._store.runs
        for index in range(WARM_UP if is_known else WARM_UP + ALONE):
            prompt, tokens = source.prompt(PROMPT_TOKENS, (), rng)
            request = LoadRequest(index, 0.0, prompt, tokens, ANSWER_TOKENS)
            records += await play(target, [request], objectives=NO_OBJECTIVES, timeout_s=TIMEOUT_S)
        if not is_known:
            self._store.add(f"{arrangement.name} alone", records[WARM_UP:])

    # ── emulated ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fit(self, arrangement: Arrangement) -> Fit:
        """From the run that is not judged, and from requests alone."""
        alone = self._store.records(f"{arrangement.name} alone")
        real_s = statistics.median(record.ttft_s for record in alone if record.ttft_s is not None)
        trace = Trace(tuple(TraceRequest(30.0 * i, PROMPT_TOKENS, ANSWER_TOKENS) for i in range(ALONE)))
        # Alone on the machine a step takes what the profile says.
        result = emulate(self._spec(arrangement, Fit(Scales(1.0, 1.0), 0.0), 0, NO_OBJECTIVES), trace)
        emulated_s = statistics.median(record.ttft_s for record in result.records if record.ttft_s is not None)
        message_s = max(0.0, real_s - emulated_s) / arrangement.hops
        records = self._store.records(self._name(arrangement, self._rates(arrangement)[FIT_RATE], FIT_SEED))
        trace = as_sent(records)

        def emulated(scales: Scales, noise: int) -> list[Latency]:
            spec = self._spec(arrangement, Fit(scales, message_s), noise, self._objectives)
            return latencies(emulate(spec, trace).records)

        return Fit(fit_scales(latencies(records), emulated), message_s)

    def _cell(self, arrangement: Arrangement, rate: float, fit: Fit) -> Cell:
        real, emulated, refused, refused_emulated = [], [], 0, 0.0
        for seed in range(self._arguments.seeds):
            records = self._store.records(self._name(arrangement, rate, seed))
            real.append(attainment(records, self._objectives))
            refused += sum(record.ending == "rejected" for record in records)
            trace = as_sent(records)
            results = [emulate(self._spec(arrangement, fit, noise, self._objectives), trace) for noise in NOISE_SEEDS]
            emulated.append(statistics.fmean(result.attainment for result in results))
            refused_emulated += statistics.fmean(result.rejected for result in results)
        return Cell(arrangement.name, rate, tuple(real), tuple(emulated), (refused, refused_emulated))

    def _spec(self, arrangement: Arrangement, fit: Fit, seed: int, objectives: Objectives) -> EmulationSpec:
        config, cluster = self._arranged(arrangement), arrangement.cluster
        scales = (fit.scales.prompts, fit.scales.decodes)
        return EmulationSpec(
            model=config.engine.model,
            prefill=cluster["prefill"],
            decode=cluster["decode"],
            colocated=cluster.get("colocated", 0),
            router=config.gateway.router.policy,
            objectives=objectives,
            seed=seed,
            prefill_cost=self._costs["prefill"].with_scales(*scales),
            decode_cost=self._costs["decode"].with_scales(*scales),
            link_latency_s=max(1e-4, fit.message_s),
            block_size=config.engine.block_size,
            prefill_config=config.prefill,
            decode_config=config.decode,
            gateway_config=config.gateway,
            min_deadline_s=TIMEOUT_S,
        )

    # ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _arranged(self, arrangement: Arrangement) -> TandemConfig:
        cluster = self._config.cluster.model_copy(update=arrangement.cluster)
        return self._config.model_copy(update={"cluster": cluster})

    def _rates(self, arrangement: Arrangement) -> list[float]:
        given = self._arguments.split_rates if arrangement.cluster["prefill"] else self._arguments.colocated_rates
        return [float(rate) for rate in given.split(",")]

    def _names(self, arrangement: Arrangement, rates: Sequence[float]) -> list[str]:
        judged = [self._name(arrangement, rate, seed) for rate in rates for seed in range(self._arguments.seeds)]
        return [f"{arrangement.name} alone", self._name(arrangement, rates[FIT_RATE], FIT_SEED), *judged]

    @staticmethod
    def _name(arrangement: Arrangement, rate: float, seed: int) -> str:
        return f"{arrangement.name}, {rate:g} req/s, seed {seed}"

    def _requests(self, rate: float, seed: int, source: RandomTokens) -> tuple[LoadRequest, ...]:
        rng = random.Random(f"lengths {rate} {seed}")
        rows = tuple(
            TraceRequest(None, length(rng, PROMPT_TOKENS, LONGEST_PROMPT), length(rng, ANSWER_TOKENS, LONGEST_ANSWER))
            for _ in range(self._arguments.n)
        )
        return Load(rows, Process(len(rows))).requests(rate, seed, f"{rate} {seed}", source)


def length(rng: random.Random, mean: int, most: int) -> int:
    return max(8, min(most, round(mean * rng.lognormvariate(-(SIGMA**2) / 2, SIGMA))))


def attainment(records: Sequence[Record], objectives: Objectives) -> float:
    return sum(record.is_met(objectives) for record in records) / len(records)


def as_sent(records: Sequence[Record]) -> Trace:
    """The requests when they were really sent, and as long as they were asked for."""
    return Trace(
        tuple(TraceRequest(r.arrival_s + max(0.0, r.late_s), r.prompt_tokens, r.asked_tokens) for r in records)
    )


def latencies(records: Sequence[Record] | Sequence[RequestRecord]) -> list[Latency]:
    return [Latency(record.ttft_s, record.tpot_s) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--profile", type=Path, help="what `tandem profile` wrote for one thread")
    parser.add_argument("--slo", default="2500,90", metavar="TTFT_MS,TPOT_MS")
    parser.add_argument("--split-rates", default="0.7,1.2,1.8,2.6", help="from light to overload; the third is fitted")
    parser.add_argument("--colocated-rates", default="0.7,1.2,1.6,2.2")
    parser.add_argument("--policy", default="goodput")
    parser.add_argument("--n", type=int, default=100, help="requests of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", metavar="NAME", default="", help="section of docs/performance.md to replace")
    arguments = parser.parse_args()
    (objectives,) = pairs_of([arguments.slo])
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = TandemConfig.model_validate(
        {
            "engine": {"model": arguments.model, "threads": 1},
            "gateway": {"router": {"policy": arguments.policy}},
            "cluster": {"address": "none", "pin_cpus": True},
        }
    )
    if arguments.profile is None:
        arguments.profile = arguments.out / "profile.json"
        if not arguments.profile.exists():
            asyncio.run(profile(config, arguments.profile, cpus="0"))
    cluster = config.cluster.model_copy(update={"profile": str(arguments.profile.resolve())})
    cells = Study(arguments, config.model_copy(update={"cluster": cluster}), objectives).cells()
    text = report(cells, objectives)
    (arguments.out / "report.md").write_text(text + "\n", encoding="utf-8")
    draw_panels(panels_of(cells), arguments.out / "attainment.png")
    print(text)
    if arguments.write:
        picture = image(arguments.write, panels_of(cells), "attainment against rate, real and emulated")
        write_section(arguments.write, f"{text}\n\n{picture}\n\n{stamp(f'{os.cpu_count()} CPUs')}")


if __name__ == "__main__":
    main()
