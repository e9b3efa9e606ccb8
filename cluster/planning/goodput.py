"""Goodput: the highest request rate at which enough requests still meet both objectives, found on the emulator.

    rate      ────────────┬──────────────────┬────────▶
    attained  yes  yes    ▲ bracket, halved  ▲  no         until both ends are within the tolerance

One trace is replayed faster or slower; its lengths, its prefixes and the shape of its bursts stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.planning.emulation_result import EmulationResult
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.emulator import emulate
from cluster.planning.forked import forked
from cluster.planning.trace import Trace
from engine.errors import ConfigError

TARGET = 0.9
TOLERANCE = 0.02
# Beyond these the trace is no longer itself: a cluster that fails at the lowest can serve no request in time.
LEAST_SCALE, MOST_SCALE = 2.0**-8, 2.0**16
# A run shorter than this would end before the queues that its rate makes could show.
MIN_SPAN_S = 10.0


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate that was tried. `attainment` of a run that was ended early counts what had not ended as missed."""

    rate_rps: float
    attainment: float
    is_attained: bool


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate found. `result` is that rate's run; where no rate will do, rates are 0.0 and `result` is the
    run of the lowest rate tried. `probes` are all runs made, in order of rate."""

    rps: float
    rps_per_gpu: float
    result: EmulationResult
    probes: tuple[Probe, ...]


def find_goodput(
    spec: EmulationSpec,
    trace: Trace,
    target: float = TARGET,
    *,
    tolerance: float = TOLERANCE,
    start_rps: float | None = None,
    min_span_s: float = MIN_SPAN_S,
    processes: int = 1,
) -> Goodput:
    """Bisects on the rate until both ends of the bracket are within `tolerance` of each other, and returns the lower.

    Every rate below the answer that was tried was attained, and the next one tried above it was not. `start_rps`: where
    to begin, the trace's own rate for None. A trace that would take less than `min_span_s` is played several times in
    a row. With several `processes` as many rates are tried at once; the answer depends on their number, but not on
    their speed. Raises ConfigError for a trace that has no rate.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"target: got {target!r}, expected a share of requests in (0, 1]")
    _check_has_rate(trace)
    probe = partial(_probe, spec, trace, target, min_span_s)
    first = 1.0 if start_rps is None else start_rps / trace.rate_rps
    if processes == 1:
        return _search(lambda scales: [probe(scale) for scale in scales], first, target, tolerance, 1)
    with forked(probe, processes) as probes:
        return _search(lambda scales: list(probes(scales)), first, target, tolerance, processes)


def attains(
    spec: EmulationSpec, trace: Trace, rps: float, target: float = TARGET, *, min_span_s: float = MIN_SPAN_S
) -> bool:
    """Whether enough requests meet their objectives at this one rate, as a search judges it: False says that
    `find_goodput` would find less. Far cheaper than a search where it fails, for the run ends when that is certain.
    Raises ConfigError for a trace that has no rate."""
    _check_has_rate(trace)
    return _is_attained(_probe(spec, trace, target, min_span_s, rps / trace.rate_rps), target)


class _Tried:
    """Scales that were tried, and the bracket that they leave: what lies below it was attained, its top was not."""

    def __init__(self, run: Callable[[Sequence[float]], list[EmulationResult]], target: float) -> None:
        self._run = run
        self._target = target
        self._probes: dict[float, Probe] = {}
        self._results: dict[float, EmulationResult] = {}

    def judge(self, scales: Sequence[float]) -> None:
        """Emulates at these scales."""
        for scale, result in zip(scales, self._run(scales), strict=True):
            is_attained = _is_attained(result, self._target)
            self._probes[scale] = Probe(result.rate_rps, result.attainment, is_attained)
            self._results[scale] = result
        # Records of thousands of requests: only those that may be asked for again are kept.
        wanted = {self.good, min(self._probes)}
        self._results = {scale: result for scale, result in self._results.items() if scale in wanted}

    @property
    def bad(self) -> float | None:
        """The lowest scale that failed."""
        return min((scale for scale, probe in self._probes.items() if not probe.is_attained), default=None)

    @property
    def good(self) -> float | None:
        """The highest scale below every one that failed: a higher one that happens to pass proves nothing."""
        bad = self.bad
        passed = (scale for scale, probe in self._probes.items() if probe.is_attained)
        return max((scale for scale in passed if bad is None or scale < bad), default=None)

    def goodput(self) -> Goodput:
        probes = tuple(self._probes[scale] for scale in sorted(self._probes))
        if (good := self.good) is None:
            return Goodput(0.0, 0.0, self._results[min(self._probes)], probes)
        result = self._results[good]
        return Goodput(result.rate_rps, result.rate_rps / result.gpus, result, probes)


def _search(
    run: Callable[[Sequence[float]], list[EmulationResult]], first: float, target: float, tolerance: float, width: int
) -> Goodput:
    """`run` emulates at several scales; it is given `width` of them at a time."""
    tried = _Tried(run, target)
    tried.judge([first])
    top = first
    while tried.bad is None and top < MOST_SCALE:
        tried.judge([top * 2 ** (step + 1) for step in range(width)])
        top *= 2**width
    while tried.good is None and (bad := tried.bad) is not None and bad > LEAST_SCALE:
        tried.judge([bad / 2 ** (width - step) for step in range(width)])
    while (good := tried.good) is not None and (bad := tried.bad) is not None and bad / good > 1 + tolerance:
        ratio = (bad / good) ** (1 / (width + 1))
        tried.judge([good * ratio ** (step + 1) for step in range(width)])
    return tried.goodput()


def _check_has_rate(trace: Trace) -> None:
    if not trace.rate_rps:
        raise ConfigError(f"trace: {len(trace)} requests that come at one moment have no rate that could be scaled")


def _is_attained(result: EmulationResult, target: float) -> bool:
    return result.is_whole and result.attainment >= target


def _probe(spec: EmulationSpec, trace: Trace, target: float, min_span_s: float, scale: float) -> EmulationResult:
    scaled = trace.scaled(scale)
    span_s = scaled.arrivals_s[-1] - scaled.arrivals_s[0]
    times = max(1, -(-min_span_s // span_s))
    return emulate(spec, scaled.repeated(int(times)), stop_below=target)
