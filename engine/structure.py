"""What an answer is to look like: valid against a JSON schema, matched by a regular expression, one of several texts,
or a sentence of a grammar. A plain value; engine/guidance.py holds answers to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np

from engine.errors import InvalidArgument

Kind = Literal["json_schema", "regex", "choice", "grammar"]
KINDS = get_args(Kind)
MAX_STRUCTURE_CHARS = 1 << 16
# JSON on one line, as models write it when nobody asks for more: else small models can go on with spaces for ever.
JSON_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

Mask: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Structure:
    """`text`: a JSON schema; a regular expression of Rust's regex syntax; a JSON list of texts; a grammar in Lark's
    notation or in GBNF."""

    kind: str
    text: str = field(repr=False)

    def validate(self) -> None:
        """Raises InvalidArgument for what no structure can be. Whether its text is in good order, only
        engine/guidance.py can say."""
        if self.kind not in KINDS:
            raise InvalidArgument("sampling_params.structure.kind", self.kind, f"one of {', '.join(KINDS)}")
        if not 0 < len(self.text) <= MAX_STRUCTURE_CHARS:
            limit = f"1 to {MAX_STRUCTURE_CHARS} characters"
            raise InvalidArgument("sampling_params.structure", f"{len(self.text)} characters", limit)

    def lost(self, output_count: int) -> InvalidArgument:
        """An answer could not be held to it after so many tokens."""
        expected = "one that names tokens of this model, and that its parser can follow within its limits"
        return InvalidArgument(
            "sampling_params.structure", self.text, f"{expected}: after {output_count} tokens it cannot"
        )


class Guide(Protocol):
    """Says which tokens may come next."""

    @property
    def is_there(self) -> bool:
        """False where it turned out that there is none."""
        ...

    def banned(self, structure: Structure, output_ids: Sequence[int]) -> Mask | None:
        """The tokens that may not come after `output_ids`: [vocab_size], True for those. None where nobody can tell:
        the answer cannot be held to its structure any further."""
        ...
