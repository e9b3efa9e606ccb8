"""Reads a JSON object from a file, and says clearly what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelFileError


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises ModelFileError where there is no JSON object at `path`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(path, f"cannot be opened: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "expected a JSON object")
    return value
