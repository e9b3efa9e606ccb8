"""Choices of tile sizes: the saved one, the fastest one, else the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from kernels.gpu import tuning
from kernels.gpu.tuning import Config, Tuner

SLOW, FAST, TOO_LARGE = Config({"TILE": 1}, 4), Config({"TILE": 2}, 8, 3), Config({"TILE": 4}, 4)
ALL = [SLOW, TOO_LARGE, FAST]


def time_by_tile(run: object) -> float:
    """The config is the one argument of the partial that the tuner makes."""
    run()
    return 1.0 / run.args[0].sizes["TILE"]


class Kernel:
    """Counts its launches."""

    def __init__(self) -> None:
        self.launched: list[Config] = []

    def __call__(self, config: Config) -> None:
        if config == TOO_LARGE:
            raise OutOfResources(500_000, 232_448, "shared memory")
        self.launched.append(config)


def tuner(folder: Path, *, enabled: bool = True, device: str | None = "H200") -> Tuner:
    made = Tuner(folder / "tuned", lambda: device, time_by_tile)
    if enabled:
        made.enable()
    return made


def test_without_measuring_it_is_the_first(tmp_path: Path) -> None:
    kernel = Kernel()
    assert tuner(tmp_path, enabled=False).choose("k", (1,), ALL, kernel) == SLOW
    assert kernel.launched == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_it_is_the_first(tmp_path: Path) -> None:
    assert tuner(tmp_path, device=None).choose("k", (1,), ALL, Kernel()) == SLOW
    assert list(tmp_path.iterdir()) == []


def test_the_fastest_is_measured_once_and_saved(tmp_path: Path) -> None:
    kernel = Kernel()
    first = tuner(tmp_path)
    assert first.choose("k", (128, "bfloat16"), ALL, kernel) == FAST
    assert kernel.launched == [SLOW, FAST]
    assert first.choose("k", (128, "bfloat16"), ALL, kernel) == FAST
    again = tuner(tmp_path, enabled=False)
    assert again.choose("k", (128, "bfloat16"), ALL, kernel) == FAST
    assert kernel.launched == [SLOW, FAST]
    assert again.choose("k", (64, "bfloat16"), ALL, kernel) == SLOW, "another key"
    assert again.choose("l", (128, "bfloat16"), ALL, kernel) == SLOW, "another kernel"
    other = tuner(tmp_path, enabled=False, device="A100")
    assert other.choose("k", (128, "bfloat16"), ALL, kernel) == SLOW, "another device"


def test_a_file_holds_every_choice_and_nothing_else_lies_beside_it(tmp_path: Path) -> None:
    for name in ("k", "l"):
        for size in (1, 2):
            tuner(tmp_path).choose(name, (size,), ALL, Kernel())
    (path,) = (tmp_path / "tuned").iterdir()
    assert path.name == "H200.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["triton"] == triton.__version__
    best = {"sizes": {"TILE": 2}, "num_warps": 8, "num_stages": 3}
    assert content["choices"] == {name: {"1": best, "2": best} for name in ("k", "l")}


def test_choices_of_another_triton_do_not_count(tmp_path: Path) -> None:
    tuner(tmp_path).choose("k", (1,), ALL, Kernel())
    (path,) = (tmp_path / "tuned").iterdir()
    path.write_text(path.read_text(encoding="utf-8").replace(triton.__version__, "2.0.0"), encoding="utf-8")
    assert tuner(tmp_path, enabled=False).choose("k", (1,), ALL, Kernel()) == SLOW
    assert tuner(tmp_path).choose("k", (1,), ALL, kernel := Kernel()) == FAST
    assert kernel.launched == [SLOW, FAST], "measured anew"


def test_a_choice_that_is_no_candidate_any_more_does_not_count(tmp_path: Path) -> None:
    tuner(tmp_path).choose("k", (1,), ALL, Kernel())
    assert tuner(tmp_path, enabled=False).choose("k", (1,), [SLOW], Kernel()) == SLOW


def test_candidates_that_all_fail_say_why(tmp_path: Path) -> None:
    with pytest.raises(OutOfResources, match="shared memory"):
        tuner(tmp_path).choose("k", (1,), [TOO_LARGE], Kernel())


def test_on_this_device(tmp_path: Path, device: torch.device) -> None:
    """With the real clock: ten times the work loses. The interpreter has nothing to tune."""
    x = torch.ones(2**24, device=device)

    def run(config: Config) -> None:
        for _ in range(config.sizes["ROUNDS"]):
            torch.add(x, 1, out=x)

    candidates = [Config({"ROUNDS": 10}, 4), Config({"ROUNDS": 1}, 4)]
    real = Tuner(tmp_path / "tuned")
    real.enable()
    chosen = real.choose("k", (1,), candidates, run)
    if device.type == "cpu":
        assert chosen == candidates[0]
        assert tuning.device_name() is None
    else:
        assert chosen == candidates[1]
        assert (tmp_path / "tuned" / f"{tuning.device_name()}.json").exists()
