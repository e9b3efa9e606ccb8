"""The planner's arithmetic beside AIConfigurator 0.12's, then the emulator's answer to the same question.

    python -m bench.aiconfigurator_check [--quick] [--json F]

AIConfigurator (NVIDIA, PyPI; the source of the operator data in this project's device files) was run for Llama-3.1-8B:

    aiconfigurator cli default --total-gpus 16 --system h200_sxm --backend vllm --isl I --osl O --ttft T --tpot T

Its answers below are constants: the tool is no dependency. It asks what requests that come evenly would get, and
corrects by factors (cluster/planning/steady_rates.py, `aiconfigurator`). The emulator asks the same of requests that
come at random.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.report import stamp, table
from cluster.commands.plan import links_of, print_judged, worker_costs
from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.bounds import lengths_of
from cluster.planning.cost_model import CostModel, cost_model
from cluster.planning.device_profile import DeviceProfile, device_profile
from cluster.planning.emulated_judge import EmulatedJudge
from cluster.planning.model_shape import ModelShape, model_shape
from cluster.planning.operator_law import OperatorLaw
from cluster.planning.plan import Judgement, PlanSpec, Question
from cluster.planning.splits import chunk_sizes
from cluster.planning.steady_rates import (
    PLAIN,
    SteadyLoad,
    SteadyPoint,
    aiconfigurator,
    best_of,
    rank,
)
from cluster.planning.trace import Trace, TraceRequest
from engine.objectives import Objectives

PROFILE, MODEL, GPUS = "h200", "llama-3.1-8b", 16
PARALLELS = (Parallel(1), Parallel(2), Parallel(4), Parallel(8))
# Rates may differ by this much.
ALLOWED = 0.15


class KernelsAlone(OperatorLaw):
    """Step times as AIConfigurator adds them up: kernels, and nothing else. No fixed part of a step, no drawing, no
    gathering of logits, no rotation and no KV writes of their own."""

    def __init__(self, device: DeviceProfile, model: ModelShape, tp: int) -> None:
        super().__init__(device, model, tp)
        self._fixed_s = 0.0

    def _vectors_s(self, tokens: int) -> float:
        norm = 4 * self._model.hidden_size
        activation = self._model.ffn_matrices * self._share.intermediate_size
        element_bytes = self._device.element_bytes
        return sum(self._moved_s(tokens * each * element_bytes) for each in (norm, norm, activation))

    def _drawn_terms_s(self, rows: int) -> float:
        return self._device.gemm_s(rows, self._share.vocab_size, self._model.hidden_size)


@functools.cache
def their_cost(parallel: Parallel) -> CostModel:
    device, model = device_profile(PROFILE), model_shape(MODEL)
    return CostModel(KernelsAlone(device, model, parallel.tp), cost_model(PROFILE, MODEL, tp=parallel.tp).facts)


@functools.cache
def our_cost(parallel: Parallel) -> CostModel:
    return cost_model(PROFILE, MODEL, tp=parallel.tp)


@dataclass(frozen=True, slots=True)
class Theirs:
    """What AIConfigurator 0.12 says: requests a second of all 16 GPUs, and of what. `tied`: another disaggregated
    arrangement that it gives the same rate, to its last digit."""

    load: SteadyLoad
    colocated_rps: float
    colocated: Arrangement
    batch: int
    disaggregated_rps: float
    disaggregated: Arrangement
    tied: Arrangement | None = None


CASES = (
    Theirs(
        SteadyLoad(4000, 500, Objectives(1.0, 0.030)),
        84.2,
        Arrangement(colocated=Pool(Parallel(1), 16)),
        80,
        73.4,
        Arrangement(Pool(Parallel(1), 9), Pool(Parallel(1), 7)),
    ),
    Theirs(
        SteadyLoad(1000, 200, Objectives(0.3, 0.050)),
        503.8,
        Arrangement(colocated=Pool(Parallel(1), 16)),
        288,
        394.3,
        Arrangement(Pool(Parallel(1), 10), Pool(Parallel(2), 3)),
        Arrangement(Pool(Parallel(1), 5), Pool(Parallel(1), 3), units=2),
    ),
)
# Tokens per second and user at which the two fronts cross, 4,000 / 500: looked for on this grid.
SPEEDS = tuple(range(20, 151, 5))


@dataclass(frozen=True, slots=True)
class Compared:
    """One kind of arrangement, theirs and ours. `ours_rps`: under their assumptions; `same_rps`: of their arrangement,
    in the same arithmetic; `plain`, `plain_rps`: the best under no assumptions but the cost model's."""

    kind: str
    theirs: str
    theirs_rps: float
    ours: str
    ours_rps: float
    same_rps: float
    plain: str
    plain_rps: float
    is_same: bool

    @property
    def ratio(self) -> float:
        return self.ours_rps / self.theirs_rps

    @property
    def is_within(self) -> bool:
        return abs(self.ratio - 1) <= ALLOWED


def ranked(load: SteadyLoad, *, is_theirs: bool) -> list[SteadyPoint]:
    """Under AIConfigurator's assumptions, or with the cost model's times and nothing else."""
    if is_theirs:
        return rank(load, GPUS, PARALLELS, their_cost, aiconfigurator(model_shape(MODEL).num_layers))
    return rank(load, GPUS, PARALLELS, our_cost, PLAIN)


def compare(case: Theirs) -> list[Compared]:
    theirs, plain = ranked(case.load, is_theirs=True), ranked(case.load, is_theirs=False)
    compared = []
    for kind, arrangement, rate_rps in (
        ("colocated", case.colocated, case.colocated_rps),
        ("disaggregated", case.disaggregated, case.disaggregated_rps),
    ):
        ours, without = best_of(theirs, kind), best_of(plain, kind)
        assert ours is not None
        assert without is not None
        batches = (case.batch, ours.batch) if kind == "colocated" else (None, None)
        same = max(
            (point.rate_rps for point in theirs if _parallels(point.arrangement) == _parallels(arrangement)),
            default=0.0,
        )
        alike = [each for each in (arrangement, case.tied) if each is not None]
        compared.append(
            Compared(
                kind,
                _name(arrangement, batches[0]),
                rate_rps,
                _name(ours.arrangement, batches[1]),
                ours.rate_rps,
                same,
                _name(without.arrangement, None),
                without.rate_rps,
                is_same=any(_flat(ours.arrangement) == _flat(each) for each in alike),
            )
        )
    return compared


def crossover(load: SteadyLoad) -> float | None:
    """Tokens per second and user from which on the best disaggregated arrangement carries more."""
    ahead = None
    for speed in reversed(SPEEDS):
        objectives = Objectives(load.objectives.ttft_s, 1 / speed)
        points = ranked(SteadyLoad(load.prompt_tokens, load.output_tokens, objectives), is_theirs=True)
        pair, single = best_of(points, "disaggregated"), best_of(points, "colocated")
        if pair is None or (single is not None and single.rate_rps >= pair.rate_rps):
            return ahead
        ahead = float(speed)
    return ahead


def emulate_both(case: Theirs, requests: int, span_answers: float, processes: int) -> list[tuple[str, Judgement]]:
    """Goodput with Poisson arrivals of the arrangements that AIConfigurator chose: the split with and without prompts
    on decode workers, colocated workers with whole prompts, as it assumes, and with chunks."""
    load = case.load
    trace = Trace((TraceRequest(None, load.prompt_tokens, load.output_tokens),) * requests)
    spec = PlanSpec(
        profile=PROFILE,
        model=MODEL,
        gpus=GPUS,
        gpus_per_node=8,
        objectives=load.objectives,
        requests=requests,
        span_answers=span_answers,
        keep=1,
        processes=processes,
    )
    costs = worker_costs(MODEL)
    pool = case.colocated.colocated
    assert pool is not None
    chunks = chunk_sizes(costs(PROFILE, pool.parallel), lengths_of(trace), load.objectives.tpot_s or 0.0)
    singles = [Arrangement(colocated=pool, chunk_tokens=chunk) for chunk in chunks]
    network_bytes_s = links_of(PROFILE).network_bytes_s
    split = Question(case.disaggregated, "both", 0.8 * case.disaggregated_rps, network_bytes_s)
    questions = [split, *(Question(single, "both", 0.8 * case.colocated_rps, network_bytes_s) for single in singles)]
    judged = EmulatedJudge(spec, trace, costs, print_judged)(questions)
    [alone] = EmulatedJudge(replace(spec, allow_local=False), trace, costs, print_judged)([split])
    labels = [f"{split.arrangement.label}, decode workers compute prompts too"]
    labels += [question.arrangement.label for question in questions[1:]]
    return [(split.arrangement.label, alone), *zip(labels, judged, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the arithmetic only, no emulation")
    parser.add_argument("--requests", type=int, default=1500, help="of one emulation, repeated until it is long enough")
    parser.add_argument("--span-answers", type=float, default=2.0, help="length of one emulation, in answers")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="one of the cases only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="where all numbers go")
    options = parser.parse_args()
    results = []
    for case in CASES if options.case is None else (CASES[options.case],):
        load = case.load
        compared = compare(case)
        print(
            f"\n{load.prompt_tokens} in / {load.output_tokens} out, TTFT {(load.objectives.ttft_s or 0) * 1e3:g} ms, "
            f"TPOT {(load.objectives.tpot_s or 0) * 1e3:g} ms, {GPUS} x {PROFILE}, {MODEL}\n"
        )
        print(_arithmetic(compared))
        crossing = crossover(load)
        print(
            f"\nDisaggregation carries more from about {crossing} tokens/s per user on (same assumptions, TTFT kept)."
        )
        emulated = (
            [] if options.quick else emulate_both(case, options.requests, options.span_answers, options.processes)
        )
        if emulated:
            print(f"\nEmulated, Poisson arrivals, goodput at 90 % of requests:\n\n{_emulation(emulated)}")
        results.append(
            {
                "load": asdict(load),
                "compared": [asdict(row) | {"ratio": row.ratio} for row in compared],
                "crossover_tokens_s_user": crossing,
                "emulated": [{"arrangement": label} | asdict(judged) for label, judged in emulated],
            }
        )
    print("\n" + stamp(f"{os.cpu_count()} CPUs"))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _arithmetic(compared: list[Compared]) -> str:
    heads = [
        "",
        "AIConfigurator",
        "req/s",
        "Tandem, its assumptions",
        "req/s",
        "ratio",
        "same",
        "its own",
        "uncorrected",
    ]
    rows = [
        [
            row.kind,
            row.theirs,
            f"{row.theirs_rps:.1f}",
            row.ours,
            f"{row.ours_rps:.1f}",
            f"{row.ratio:.3f}",
            "yes" if row.is_same else "no",
            f"{row.same_rps:.1f}",
            f"{row.plain}: {row.plain_rps:.1f}",
        ]
        for row in compared
    ]
    return table(heads, rows)


def _emulation(emulated: list[tuple[str, Judgement]]) -> str:
    rows = [
        [
            label,
            f"{judged.goodput_rps:.1f}",
            f"{judged.goodput_rps / GPUS:.2f}",
            "-" if judged.ttft_p90_s is None else f"{judged.ttft_p90_s * 1e3:.0f} ms",
            "-" if judged.tpot_p90_s is None else f"{judged.tpot_p90_s * 1e3:.1f} ms",
            judged.note,
        ]
        for label, judged in emulated
    ]
    return table(["arrangement", "req/s", "per GPU", "TTFT p90", "TPOT p90", ""], rows)


def _flat(arrangement: Arrangement) -> tuple[tuple[Parallel, int] | None, ...]:
    """Workers of each role, whatever units they come in."""
    pools = (arrangement.prefill, arrangement.decode, arrangement.colocated)
    return tuple(None if pool is None else (pool.parallel, pool.count * arrangement.units) for pool in pools)


def _parallels(arrangement: Arrangement) -> tuple[Parallel | None, ...]:
    return tuple(None if each is None else each[0] for each in _flat(arrangement))


def _name(arrangement: Arrangement, batch: int | None) -> str:
    return arrangement.label.partition(",")[0] + (f", batch {batch}" if batch else "")


if __name__ == "__main__":
    main()
