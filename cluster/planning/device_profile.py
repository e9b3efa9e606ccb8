"""What a device is to a cost model: its memory, its links and the time of each operator. Reads and writes the files.

cluster/planning/profiles/NAME.json   packaged: from measured operators (bench/device_files.py) or published rates
any path                              one that `tandem profile` has measured
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.planning.operators import (
    Collective,
    Curve,
    DecodeAttention,
    Gemm,
    Grid,
    PrefillAttention,
    Roofline,
)
from engine.errors import ConfigError

FORMAT = "tandem-device-1"
PACKAGED = Path(__file__).parent / "profiles"
# A correction is stored as a whole number of these steps of its natural logarithm: +-0.5 %.
LOG_STEP = 1 / 100


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device. All times in seconds, for one device's share of the work.

    `nvlink_bytes_s`: one GPU to another of its node, one way. `network_bytes_s`: one GPU to another node's, one way.
    `source`: where the numbers come from, one sentence.
    """

    name: str
    source: str
    memory_bytes: int
    element_bytes: int
    nvlink_bytes_s: float
    network_bytes_s: float
    gemm: Gemm
    prefill_attention: PrefillAttention
    decode_attention: DecodeAttention
    collectives: Mapping[str, Collective]
    memory_copy: Roofline
    licence: str = ""

    def gemm_s(self, m: int, n: int, k: int) -> float:
        """[m, k] x [k, n] as torch.nn.functional.linear does it."""
        return self.gemm.seconds(m, n, k)

    def prefill_attention_s(
        self, new_tokens: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int, batch: int = 1
    ) -> float:
        """Causal attention of `batch` equal sequences: new tokens over themselves and `context` cached ones."""
        return self.prefill_attention.seconds(new_tokens, context, num_heads, num_kv_heads, head_dim, batch)

    def decode_attention_s(
        self, rows: int, context_tokens_sum: float, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> float:
        """One new token for each row; the rows' contexts together, new tokens included."""
        return self.decode_attention.seconds(context_tokens_sum / rows, num_heads, num_kv_heads, head_dim, rows)

    def all_reduce_s(self, size_bytes: float, ranks: int) -> float:
        """Sum of `size_bytes` over the ranks of one node, as vLLM does it in a CUDA graph; 0 for one rank."""
        return self.collective_s("all_reduce", size_bytes, ranks)

    def collective_s(self, kind: str, size_bytes: float, ranks: int) -> float:
        """Of one of `collectives`; "nccl_" ones were measured with nccl-tests, sizes as they count them."""
        return self.collectives[kind].seconds(size_bytes, ranks)

    def memory_copy_s(self, size_bytes: float) -> float:
        """Copying `size_bytes` within the device: they are read and written."""
        return self.memory_copy.seconds(0.0, 2.0 * size_bytes)


def device_profile(name_or_path: str) -> DeviceProfile:
    """A packaged profile by name, or one from a file. Raises ConfigError naming the known ones, or what is wrong."""
    packaged = PACKAGED / f"{name_or_path}.json"
    path = packaged if name_or_path in known_profiles() else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(known_profiles())
        raise ConfigError(f"profile {name_or_path!r} is no packaged device and no file; known devices: {known}")
    try:
        return profile_of(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"profile {path}: {type(error).__name__}: {error}; `tandem profile` writes a good one"
        ) from None


def known_profiles() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in PACKAGED.glob("*.json")))


def profile_of(values: Mapping[str, Any]) -> DeviceProfile:
    """A profile from parsed JSON. Raises KeyError, TypeError, ValueError or AssertionError where it does not fit."""
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')!r}, expected {FORMAT!r}")
    element_bytes = int(values["element_bytes"])
    return DeviceProfile(
        name=str(values["name"]),
        source=str(values["source"]),
        licence=str(values.get("licence", "")),
        memory_bytes=int(values["memory_bytes"]),
        element_bytes=element_bytes,
        nvlink_bytes_s=_rate(values, "nvlink_bytes_s"),
        network_bytes_s=_rate(values, "network_bytes_s"),
        gemm=Gemm(
            _roofline(values["gemm"]),
            _grid(values["gemm"]),
            element_bytes,
            int(values["gemm"].get("units", 1)),
            float(values["gemm"].get("wave_power", 0.0)),
        ),
        prefill_attention=PrefillAttention(
            _roofline(values["prefill_attention"]), _grid(values["prefill_attention"]), element_bytes
        ),
        decode_attention=DecodeAttention(
            _roofline(values["decode_attention"]), _grid(values["decode_attention"]), element_bytes
        ),
        collectives={kind: _collective(kind, each) for kind, each in values["collectives"].items()},
        memory_copy=_roofline(values["memory_copy"]),
    )


def profile_json(profile: DeviceProfile) -> str:
    """The file's text: what `profile_of` reads, corrections rounded to LOG_STEP, one grid row per line."""
    scalars = {
        "format": FORMAT,
        "name": profile.name,
        "source": profile.source,
        "licence": profile.licence,
        "memory_bytes": profile.memory_bytes,
        "element_bytes": profile.element_bytes,
        "nvlink_bytes_s": profile.nvlink_bytes_s,
        "network_bytes_s": profile.network_bytes_s,
        "memory_copy": _roofline_json(profile.memory_copy),
    }
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in scalars.items()]
    curves = [f"{json.dumps(kind)}: {_collective_json(each)}" for kind, each in profile.collectives.items()]
    parts.append(' "collectives": {\n  ' + ",\n  ".join(curves) + "}")
    gemm, prefill, decode = profile.gemm, profile.prefill_attention, profile.decode_attention
    waves = {"units": gemm.units, "wave_power": gemm.wave_power}
    parts.append(f' "gemm": {_operator_json(gemm.roofline, gemm.grid, waves)}')
    parts.append(f' "prefill_attention": {_operator_json(prefill.roofline, prefill.grid)}')
    parts.append(f' "decode_attention": {_operator_json(decode.roofline, decode.grid)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _collective_json(collective: Collective) -> str:
    curves = {
        str(ranks): {"bytes": [int(size) for size in curve.sizes_bytes], "us": [_short(s * 1e6) for s in curve.seconds]}
        for ranks, curve in collective.curves
    }
    return json.dumps({**_roofline_json(collective.link), "curves": curves}, separators=(",", ":"))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _operator_json(roofline: Roofline, grid: Grid | None, more: Mapping[str, float] | None = None) -> str:
    values: dict[str, Any] = {**_roofline_json(roofline), **(more or {})}
    if grid is None:
        return json.dumps(values)
    values["axes"] = [[int(x) if x == int(x) else x for x in axis] for axis in grid.axes]
    values["log_step"] = LOG_STEP
    row = len(grid.axes[-1])
    steps = [round(value / LOG_STEP) for value in grid.values]
    rows = [json.dumps(steps[i : i + row], separators=(",", ":")) for i in range(0, len(steps), row)]
    return json.dumps(values)[:-1] + ', "log_corrections": [\n  ' + ",\n  ".join(rows) + "]}"


def _roofline_json(roofline: Roofline) -> dict[str, float]:
    values = {"flops_s": roofline.flops_s, "bytes_s": roofline.bytes_s, "latency_s": roofline.latency_s}
    if roofline.cache_bytes:
        values |= {"cache_bytes": roofline.cache_bytes, "cached_bytes_s": roofline.cached_bytes_s}
    return {key: _short(value) for key, value in values.items()}


def _rate(values: Mapping[str, Any], key: str) -> float:
    rate = float(values[key])
    if not rate > 0:
        raise ValueError(f"{key} = {rate}, expected above 0")
    return rate


def _roofline(values: Mapping[str, Any]) -> Roofline:
    latency_s = float(values["latency_s"])
    if not latency_s >= 0:
        raise ValueError(f"latency_s = {latency_s}, expected at least 0")
    if "cache_bytes" not in values:
        return Roofline(_rate(values, "flops_s"), _rate(values, "bytes_s"), latency_s)
    cache = _rate(values, "cache_bytes"), _rate(values, "cached_bytes_s")
    return Roofline(_rate(values, "flops_s"), _rate(values, "bytes_s"), latency_s, *cache)


def _grid(values: Mapping[str, Any]) -> Grid | None:
    if "axes" not in values:
        return None
    step = float(values["log_step"])
    steps = [int(value) * step for row in values["log_corrections"] for value in row]
    return Grid(tuple(tuple(map(float, axis)) for axis in values["axes"]), tuple(steps))


def _collective(kind: str, values: Mapping[str, Any]) -> Collective:
    curves = []
    for ranks, points in values.get("curves", {}).items():
        sizes, times = tuple(map(float, points["bytes"])), tuple(float(us) * 1e-6 for us in points["us"])
        if len(sizes) != len(times) or not sizes or list(sizes) != sorted(set(sizes)) or min(times) <= 0:
            raise ValueError(f"{kind} curve of {ranks} ranks: sizes must rise, one time above 0 for each")
        curves.append((int(ranks), Curve(sizes, times)))
    return Collective(_roofline(values), tuple(sorted(curves, key=lambda item: item[0])))
