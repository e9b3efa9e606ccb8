"""How clients ask for structured answers: OpenAI's `response_format`, and vLLM's `guided_*`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.errors import InvalidArgument
from engine.structure import Structure

ANY_OBJECT = json.dumps({"type": "object"})


class JsonSchema(BaseModel):
    """`strict` false is held to the schema as well."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structure(self) -> Structure | None:
        """Raises InvalidArgument where type and schema do not go together."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            given = "none" if self.json_schema is None else "one"
            raise InvalidArgument("response_format.json_schema", given, f"what goes with type {self.type!r}")
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema is not None else None
        return Structure("json_schema", ANY_OBJECT if schema is None else json.dumps(schema))


class StructureFields(BaseModel):
    """Any one of them, or none."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None

    def structure(self) -> Structure | None:
        """Raises InvalidArgument for several at once."""
        found: dict[str, Structure] = {}
        if self.response_format is not None and (asked := self.response_format.structure()) is not None:
            found["response_format"] = asked
        if self.guided_json is not None:
            text = self.guided_json if isinstance(self.guided_json, str) else json.dumps(self.guided_json)
            found["guided_json"] = Structure("json_schema", text)
        if self.guided_regex is not None:
            found["guided_regex"] = Structure("regex", self.guided_regex)
        if self.guided_choice is not None:
            found["guided_choice"] = Structure("choice", json.dumps(self.guided_choice, ensure_ascii=False))
        if self.guided_grammar is not None:
            found["guided_grammar"] = Structure("grammar", self.guided_grammar)
        if len(found) > 1:
            first, second, *_ = found
            raise InvalidArgument(second, "a structure", f"none beside {first}")
        return next(iter(found.values()), None)

    def structure_field(self) -> str:
        """The field that asks for the structure."""
        names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        return next((name for name in names if getattr(self, name) is not None), "response_format")
