"""Does the emulator say what really happens? The same requests against real workers, and against their emulation.

    python -m bench.emulator_against_reality [--profile F] [--slo 2500,90] [--split-rates 0.7,1.2,1.8,2.6]
        [--colocated-rates …] [--n 100] [--seeds 2] --out FOLDER [--write NAME]

The real model on this machine's CPU, one thread a worker: one prefill and one decode worker, and two colocated ones.
Fitted: the profile (`tandem profile`, measured here first unless --profile brings one), and from one sweep through all
rates of each arrangement how much longer steps take beside others on the same machine (bench/scale_fit.py) and what a
message takes (from requests alone). Judged: further sweeps, with other prompts, lengths and arrivals, at four rates
from light to overload. The emulation gets nothing of these but when each request came and how long it was.

One service plays all sweeps of an arrangement one after the other, and so does one emulation: the gateway has learned
from the runs before how far its predictions are off, and a gateway that knows nothing refuses more.

Attainment of each cell, real and emulated, and the goodput that follows: the rate at which attainment crosses 90 %,
on a straight line between rates. FOLDER gets a file of each arrangement's requests (a study that was interrupted does
not play an arrangement again that has ended) and report.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.plots import draw_panels, image
from bench.reality_report import Cell, panels_of, report
from bench.reality_session import Run, Session, as_sent
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
from cluster.loadtest.record import Record
from cluster.loadtest.request import LoadRequest
from cluster.loadtest.tandem_target import TandemTarget
from cluster.planning.emulation_result import Ending, RequestRecord
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


class Study:
    """Both arrangements, their real runs and their emulations."""

    def __init__(self, arguments: argparse.Namespace, config: TandemConfig, objectives: Objectives) -> None:
        self._arguments = arguments
        self._config = config
        self._objectives = objectives
        files = resolve(config.engine.model)
        roles: tuple[Role, ...] = ("prefill", "decode")
        self._costs = {role: role_cost(config, files, role) for role in roles}
        self._say = Console(stderr=True, highlight=False).print

    def cells(self) -> list[Cell]:
        found = []
        for arrangement in ARRANGEMENTS:
            path = self._arguments.out / f"{arrangement.name.replace(' ', '')}.runs.json"
            if not path.exists():
                self._say(f"{arrangement.name}: {1 + self._arguments.seeds} sweeps of real runs")
                path.write_text(json.dumps(asyncio.run(self._play(arrangement)).to_json()), encoding="utf-8")
            session = Session.from_json(json.loads(path.read_text(encoding="utf-8")))
            fit = self._fit(arrangement, session)
            self._say(f"{arrangement.name}: {fit}")
            found += self._judge(arrangement, session, fit)
        return found

    # ── real ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _play(self, arrangement: Arrangement) -> Session:
        config = self._arranged(arrangement)
        path = (self._arguments.out / f"{arrangement.name.replace(' ', '')}.json").resolve()
        path.write_text(config.model_dump_json(), encoding="utf-8")
        runs = []
        async with running(tandem_server(path)) as address:
            target = TandemTarget("tandem", address)
            try:
                source = RandomTokens((await target.facts()).vocab_size)
                alone = await self._play_alone(target, source)
                began_s = time.monotonic()
                for seed, rate in itertools.product(
                    (FIT_SEED, *range(self._arguments.seeds)), self._rates(arrangement)
                ):
                    started_s = time.monotonic() - began_s
                    requests = self._requests(rate, seed, source)
                    records = await play(target, requests, objectives=self._objectives, timeout_s=TIMEOUT_S)
                    runs.append(Run(rate, seed, started_s, tuple(records)))
                    met = attainment(records, self._objectives)
                    self._say(f"{arrangement.name}, {rate:g} req/s, seed {seed}: {met:.3f}")
            finally:
                await target.close()
        return Session(tuple(alone), tuple(runs))

    async def _play_alone(self, target: TandemTarget, source: RandomTokens) -> list[Record]:
        """Requests that have the service to themselves; the first, which warm it up, are left out."""
        rng, records = random.Random("alone"), list[Record]()
        for index in range(WARM_UP + ALONE):
            prompt, tokens = source.prompt(PROMPT_TOKENS, (), rng)
            request = LoadRequest(index, 0.0, prompt, tokens, ANSWER_TOKENS)
            records += await play(target, [request], objectives=NO_OBJECTIVES, timeout_s=TIMEOUT_S)
        return records[WARM_UP:]

    # ── emulated ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fit(self, arrangement: Arrangement, session: Session) -> Fit:
        """From the sweep that is not judged, and from requests alone."""
        real_s = statistics.median(record.ttft_s for record in session.alone if record.ttft_s is not None)
        trace = Trace(tuple(TraceRequest(30.0 * i, PROMPT_TOKENS, ANSWER_TOKENS) for i in range(ALONE)))
        # Alone on the machine a step takes what the profile says.
        result = emulate(self._spec(arrangement, Fit(Scales(1.0, 1.0), 0.0), 0, NO_OBJECTIVES), trace)
        emulated_s = statistics.median(record.ttft_s for record in result.records if record.ttft_s is not None)
        message_s = max(0.0, real_s - emulated_s) / arrangement.hops
        runs = [run for run in session.runs if run.seed == FIT_SEED]

        def emulated(scales: Scales, noise: int) -> list[Latency]:
            spec = self._spec(arrangement, Fit(scales, message_s), noise, self._objectives)
            return latencies(emulate(spec, as_sent(runs)).records)

        return Fit(fit_scales(latencies([record for run in runs for record in run.records]), emulated), message_s)

    def _judge(self, arrangement: Arrangement, session: Session, fit: Fit) -> list[Cell]:
        trace = as_sent(session.runs)
        specs = [self._spec(arrangement, fit, noise, self._objectives) for noise in NOISE_SEEDS]
        emulations = [session.cut(emulate(spec, trace).records) for spec in specs]
        cells = []
        for rate in self._rates(arrangement):
            places = [i for i, run in enumerate(session.runs) if run.rate_rps == rate and run.seed != FIT_SEED]
            real = [session.runs[i].records for i in places]
            emulated = [[emulation[i] for emulation in emulations] for i in places]
            refused = sum(record.ending == "rejected" for records in real for record in records)
            refused_emulated = sum(statistics.fmean(map(rejected, runs)) for runs in emulated)
            cells.append(
                Cell(
                    arrangement.name,
                    rate,
                    tuple(attainment(records, self._objectives) for records in real),
                    tuple(statistics.fmean(self._attained(records) for records in runs) for runs in emulated),
                    (refused, refused_emulated),
                )
            )
        return cells

    def _attained(self, records: Sequence[RequestRecord]) -> float:
        return sum(record.meets(self._objectives) for record in records) / len(records)

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


def rejected(records: Sequence[RequestRecord]) -> int:
    return sum(record.ending is Ending.REJECTED for record in records)


def latencies(records: Sequence[Record | RequestRecord]) -> list[Latency]:
    return [Latency(record.ttft_s, record.tpot_s) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--profile", type=Path, help="what `tandem profile` wrote for one thread")
    parser.add_argument("--slo", default="2500,90", metavar="TTFT_MS,TPOT_MS")
    parser.add_argument("--split-rates", default="0.7,1.2,1.8,2.6", help="from light to overload")
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
