"""The flags of `tandem bench` as one value, and what they come to: load, targets, plan."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.client_access import read_access
from cluster.host_port import is_host_port
from cluster.loadtest.load import Load, Process
from cluster.loadtest.study import StudyPlan
from cluster.loadtest.target import Target
from cluster.planning.trace import Trace, TraceRequest, read_trace
from engine.errors import ConfigError
from engine.objectives import Objectives

DEFAULT_REQUESTS = 100
DEFAULT_INPUT_TOKENS = 256
DEFAULT_OUTPUT_TOKENS = 64
DEFAULT_URL = "127.0.0.1:50051"
GRPC = "grpc://"


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Each field is a flag; None: not given. `requests`: how many a run has (of a trace: its first ones). `seeds`: how
    many seeds from `seed` on are pooled."""

    url: str | None = None
    target: Sequence[str] = ()
    trace: Path | None = None
    spread: bool = False
    rate: float | None = None
    rates: str | None = None
    arrivals: Literal["poisson", "gamma", "fixed"] = "poisson"
    cv: float | None = None
    requests: int | None = None
    seed: int = 0
    seeds: int = 1
    prompts: Path | None = None
    prompt_form: Literal["auto", "ids", "text"] = "auto"
    input_tokens: int | None = None
    output_tokens: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    model: str = ""
    api_key_file: Path | None = None
    ca: Path | None = None
    header: Sequence[str] = ()
    extra_body: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    send_objectives: bool = True
    find_goodput: bool = False
    attainment: float = 0.9
    tolerance: float = 0.05
    max_probes: int = 12
    slo_scales: str | None = None
    timeout_s: float = 300.0
    pause_s: float = 1.0
    warm_up: int = 2
    reslo: Path | None = None
    out: Path | None = None
    as_json: bool = False

    @property
    def objectives(self) -> Objectives:
        return Objectives(_seconds(self.ttft_ms), _seconds(self.tpot_ms))

    @property
    def scales(self) -> tuple[float, ...]:
        return _numbers("--slo-scales", self.slo_scales)

    def check(self) -> None:
        """Raises ConfigError, naming the flag, for values that cannot be and flags that do not go together."""
        for flag, value in (
            ("--ttft-ms", self.ttft_ms),
            ("--tpot-ms", self.tpot_ms),
            ("--rate", self.rate),
            ("--cv", self.cv),
            ("--timeout-s", self.timeout_s),
            ("--tolerance", self.tolerance),
        ):
            _check(flag, value, value is None or (math.isfinite(value) and value > 0), "a positive number")
        for flag, count, least in (
            ("--requests", self.requests, 1),
            ("--seeds", self.seeds, 1),
            ("--input-tokens", self.input_tokens, 1),
            ("--output-tokens", self.output_tokens, 1),
            ("--max-probes", self.max_probes, 1),
            ("--warm-up", self.warm_up, 0),
        ):
            _check(flag, count, count is None or count >= least, f"a number of {least} or more")
        _check("--attainment", self.attainment, 0 < self.attainment <= 1, "a share in (0, 1]")
        _check("--pause-s", self.pause_s, math.isfinite(self.pause_s) and self.pause_s >= 0, "0 or more seconds")
        _check(
            "--temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"
        )
        _check("--arrivals", self.arrivals, self.arrivals in ("poisson", "gamma", "fixed"), "poisson, gamma or fixed")
        _check("--prompt-form", self.prompt_form, self.prompt_form in ("auto", "ids", "text"), "auto, ids or text")
        _numbers("--rates", self.rates)
        _numbers("--slo-scales", self.slo_scales)
        if self.url is not None and self.target:
            raise ConfigError("--url: goes with no --target; give every target as --target NAME=URL")
        if self.rate is not None and self.rates is not None:
            raise ConfigError("--rates: goes with no --rate")
        if self.find_goodput and self.rates is not None:
            raise ConfigError("--rates: goes with no --find-goodput, which chooses the rates itself, from --rate on")
        if self.cv is not None and self.arrivals == "fixed":
            raise ConfigError("--cv: goes with --arrivals gamma")
        if (self.find_goodput or self.slo_scales is not None) and self.objectives == Objectives():
            flag = "--find-goodput" if self.find_goodput else "--slo-scales"
            raise ConfigError(f"{flag}: needs --ttft-ms, --tpot-ms or both: without objectives every answer is in time")
        if self.trace is not None and self.input_tokens is not None:
            raise ConfigError("--input-tokens: goes with no --trace, which has lengths of its own")
        if self.prompts is not None and self.input_tokens is not None:
            raise ConfigError("--input-tokens: goes with no --prompts, which are as long as they are")


def make_load(options: BenchOptions) -> Load:
    """Raises ConfigError for a trace that cannot be read."""
    # Of a gamma process with no CV given, a moderately bursty one.
    kind = "gamma" if options.cv is not None else options.arrivals
    cv = options.cv if options.cv is not None else 2.0
    if options.trace is None:
        count = options.requests or DEFAULT_REQUESTS
        row = TraceRequest(
            None, options.input_tokens or DEFAULT_INPUT_TOKENS, options.output_tokens or DEFAULT_OUTPUT_TOKENS
        )
        return Load((row,) * count, Process(count, kind, cv))
    trace = read_trace(options.trace, options.requests)
    if options.spread:
        trace = trace.spread()
    rows = _with_output(trace, options.output_tokens)
    return Load(rows, None if trace.has_arrivals else Process(len(rows), kind, cv))


def make_plan(options: BenchOptions, load: Load) -> StudyPlan:
    """Raises ConfigError when neither a flag nor the trace says a rate."""
    rates = _numbers("--rates", options.rates) or ((options.rate,) if options.rate is not None else ())
    if not rates and load.process is None:
        # A trace of one moment has no rate of its own; it is sent at once.
        rates = (load.own_rate_rps or 1.0,)
    if not rates and options.find_goodput:
        rates = (1.0,)
    if not rates:
        raise ConfigError("--rate: not given, expected --rate, --rates or a --trace with arrivals")
    return StudyPlan(
        options.objectives,
        rates,
        tuple(range(options.seed, options.seed + options.seeds)),
        options.scales or (1.0,),
        options.find_goodput,
        options.attainment,
        options.tolerance,
        options.max_probes,
        timeout_s=options.timeout_s,
        pause_s=options.pause_s,
        warm_up=options.warm_up,
    )


def make_targets(options: BenchOptions) -> list[Target]:
    """One per --target, or the one of --url. Raises ConfigError naming the flag."""
    if not options.target:
        url = options.url or DEFAULT_URL
        return [_make_target("openai" if _is_http(url) else "tandem", url, "--url", options)]
    targets: list[Target] = []
    for text in options.target:
        name, equals, url = text.partition("=")
        if not (name and equals and url):
            raise ConfigError(f"--target: got {text!r}, expected NAME=URL")
        if name in (target.name for target in targets):
            raise ConfigError(f"--target: got {name!r} twice, expected names that differ")
        targets.append(_make_target(name, url, "--target", options))
    return targets


def _make_target(name: str, url: str, flag: str, options: BenchOptions) -> Target:
    if _is_http(url):
        from cluster.loadtest.openai_target import OpenAITarget

        return OpenAITarget(
            name,
            url,
            model=options.model,
            ignore_eos=options.ignore_eos,
            temperature=options.temperature,
            extra_body=_body(options.extra_body),
            headers=dict(_header(text) for text in options.header),
        )
    address = url.removeprefix(GRPC)
    if not is_host_port(address):
        raise ConfigError(f"{flag}: got {url!r}, expected HOST:PORT, grpc://HOST:PORT or http://HOST:PORT/v1")
    from cluster.loadtest.tandem_target import TandemTarget

    return TandemTarget(
        name,
        address,
        access=read_access(options.api_key_file, options.ca, address),
        # What earlier commands sent is in the service's cache; this one's prompts must not be found there.
        cache_salt=f"bench {uuid.uuid4().hex}",
        sends_objectives=options.send_objectives,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
    )


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _with_output(trace: Trace, output_tokens: int | None) -> tuple[TraceRequest, ...]:
    if output_tokens is None:
        return trace.requests
    return tuple(
        TraceRequest(row.arrival_s, row.prompt_tokens, output_tokens, row.prefix_hashes) for row in trace.requests
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _numbers(flag: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    _check(
        flag, text, bool(numbers) and all(0 < n < math.inf for n in numbers), "positive numbers, with commas between"
    )
    return numbers


def _check(flag: str, value: object, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ConfigError(f"{flag}: got {value!r}, expected {expected}")


def _body(text: str | None) -> Mapping[str, Any]:
    try:
        body = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body: is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"--extra-body: got {text!r}, expected a JSON object")
    return body


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.strip()):
        # Not the text itself: it may hold a key.
        raise ConfigError("--header: expected NAME=VALUE")
    return name.strip(), value.strip()
