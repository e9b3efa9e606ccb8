"""Reads named values out of a parsed model file, and says clearly what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import ModelFileError

# No size or token id in a model comes near this; a larger one means a corrupt file, not a large model.
COUNT_MAX = 1 << 31


class Fields:
    """A mapping from a file, with typed getters. Each raises ModelFileError naming the key and the value.

    A getter's default of None means that the key must be there. A JSON null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(self.where, problem)

    def count(self, key: str, default: int | None = None, at_least: int = 1) -> int:
        """An integer in [at_least, COUNT_MAX)."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < COUNT_MAX:
            raise self._wrong(key, value, f"an integer of at least {at_least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def choice(self, key: str, known: Sequence[str]) -> str:
        value = self.text(key)
        if value not in known:
            raise self.error(f"{key} = {value!r} is not supported; known: {', '.join(known)}")
        return value

    def token_ids(self, key: str) -> list[int]:
        """One token id or a list of them; none when the key is absent."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < COUNT_MAX:
                raise self._wrong(key, value, "a token id or a list of them")
        return ids

    def group(self, key: str) -> Fields | None:
        """A nested mapping, None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a mapping")
        return Fields(value, f"{self.where}: {key}")

    def _get(self, key: str, default: Any) -> Any:  # noqa: ANN401 - a parsed file holds anything
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(f"{key} is missing")
        return default

    def _wrong(self, key: str, value: object, expected: str) -> ModelFileError:
        shown = repr(value)
        return self.error(f"{key} = {shown if len(shown) <= 60 else shown[:57] + '...'}, expected {expected}")
