"""A plan as a picture: what each arrangement carries for a GPU, against how fast its users get their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cluster.planning.arrangement import Kind
from cluster.planning.plan import Arm, Plan

# Disaggregated arrangements are round and blue, colocated ones square and red.
COLOURS: dict[Kind, str] = {"disaggregated": "#0b6e99", "colocated": "#b7410e"}
MARKERS: dict[Kind, str] = {"disaggregated": "o", "colocated": "s"}
SIZE_INCHES = (10.0, 5.4)
DPI = 150


def plot_plan(plan: Plan, path: Path) -> None:
    """Writes a PNG: goodput per GPU over tokens per second and user; the objective as a line, the Pareto front as
    steps. Arrangements that keep the objectives at no rate are listed in the title instead.
    """
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [arm for arm in plan.arms if arm.goodput_rps > 0]
    _draw_front(axes, shown)
    _draw_arms(axes, shown, plan.chosen)
    tpot_s = plan.spec.objectives.tpot_s or 0.0
    axes.axvline(1 / tpot_s, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        f" TPOT objective, {tpot_s * 1e3:g} ms",
        (1 / tpot_s, 0.02),
        xycoords=("data", "axes fraction"),
        color="grey",
        fontsize=8,
    )
    axes.set_xlabel("tokens per second and user (1 / TPOT p90, at the highest rate that keeps the objectives)")
    axes.set_ylabel("goodput, requests per second and GPU")
    axes.set_ylim(bottom=0, top=1.12 * max((arm.rps_per_gpu for arm in shown), default=1.0))
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
    none = [arm.arrangement.label for arm in plan.arms if arm.goodput_rps <= 0]
    beneath = f"\nkeeps the objectives at no rate: {'; '.join(none)}" if none else ""
    axes.set_title(_heading(plan) + beneath, fontsize=9, loc="left")
    if shown:
        figure.legend(
            loc="outside right upper",
            fontsize=8,
            frameon=False,
            title="req/s per GPU",
            title_fontsize=8,
            markerscale=0.6,
        )
    figure.savefig(path, format="png")


def _heading(plan: Plan) -> str:
    spec = plan.spec
    ttft_ms, tpot_ms = (spec.objectives.ttft_s or 0) * 1e3, (spec.objectives.tpot_s or 0) * 1e3
    lengths = f"{plan.mean_prompt_tokens:.0f} in, {plan.mean_output_tokens:.0f} out"
    return (
        f"{spec.model} on {spec.gpus} x {spec.profile}: {lengths}; TTFT {ttft_ms:g} ms, TPOT {tpot_ms:g} ms, "
        f"{spec.target:.0%} attained"
    )


def _draw_arms(axes: Axes, arms: Sequence[Arm], chosen: Arm | None) -> None:
    """Numbered points, whose names are in the legend: names beside points would lie over each other."""
    for number, arm in enumerate(arms, 1):
        kind = arm.arrangement.kind
        x, y = _tokens_s(arm), arm.rps_per_gpu
        if arm is chosen:
            axes.plot([x], [y], "o", markersize=22, markerfacecolor="none", color="black")
        label = f"{number}  {arm.arrangement.label}: {y:.3g}" + ("  (chosen)" if arm is chosen else "")
        axes.plot([x], [y], MARKERS[kind], color=COLOURS[kind], markersize=13, markeredgecolor="white", label=label)
        axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=8, color="white")


def _draw_front(axes: Axes, arms: Sequence[Arm]) -> None:
    """Steps through the arms that no other beats in both."""
    front: list[tuple[float, float]] = []
    for arm in sorted(arms, key=lambda arm: (-_tokens_s(arm), -arm.rps_per_gpu)):
        if not front or arm.rps_per_gpu > front[-1][1]:
            front.append((_tokens_s(arm), arm.rps_per_gpu))
    if len(front) > 1:
        axes.step([x for x, _ in front], [y for _, y in front], where="pre", color="lightgrey", linewidth=1.5, zorder=0)


def _tokens_s(arm: Arm) -> float:
    tpot_s = arm.judgement.tpot_p90_s
    return 1 / tpot_s if tpot_s else 0.0
