"""docs/limits.md says what the code and the configuration's defaults say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.config import TandemConfig

PAGE = Path(__file__).parent.parent / "docs" / "limits.md"
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in PAGE.read_text().partition("## What was tried")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| what")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_limits_are_what_they_are_said_to_be(row: list[str]):
    what, at_most, where, beyond = row
    assert all((what, at_most, beyond)), "a cell is empty"
    names = re.findall(r"`([^`]+)`", where)
    said = re.findall(r"([\d,]*\d(?:\.\d+)?)(?: (KiB|MiB))?", at_most)
    if not said or not names:
        return
    # Where there are two numbers, the constant is the one with a unit.
    number, unit = next((each for each in said if each[1]), said[0])
    assert value_of(*names) == float(number.replace(",", "")) * UNITS.get(unit, 1)


def value_of(name: str, file: str = "") -> Any:
    if not file:
        value: Any = TandemConfig()
        for part in name.split("."):
            value = getattr(value, part)
        return value
    first, *rest = name.split(".")
    value = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), first)
    # A class's field by its default.
    return value.__dataclass_fields__[rest[0]].default if rest else value
