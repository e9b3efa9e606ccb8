"""A command whose flags are the fields of a frozen dataclass: names, types and defaults stand there, and only there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from typer.models import OptionInfo

Options = TypeVar("Options")


def command_of(
    options: type[Options], flags: Mapping[str, OptionInfo], call: Callable[[Options], None]
) -> Callable[..., None]:
    """What Typer makes a command of: one flag for each field of `options`, described by `flags` under its name.

    `call` gets the value; its docstring is the command's help.
    """
    hints = get_type_hints(options)
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    assert fields.keys() == flags.keys(), f"flags and fields differ in {sorted(fields.keys() ^ flags.keys())}"
    lists = {name for name in fields if get_origin(hints[name]) in (Sequence, tuple)}
    # Typer knows lists only.
    kinds: dict[str, Any] = {name: list[str] | None if name in lists else hints[name] for name in fields}

    def command(**values: Any) -> None:  # noqa: ANN401
        for name in lists:
            values[name] = tuple(values[name] or ())
        call(options(**values))

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[kinds[name], flags[name]],
            default=inspect.Parameter.empty
            if fields[name].default is dataclasses.MISSING
            else (None if name in lists else fields[name].default),
        )
        for name in flags
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = call.__doc__
    return command
