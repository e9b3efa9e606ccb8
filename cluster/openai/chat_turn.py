"""One choice of a chat's answer that may call tools, as OpenAI's messages and deltas tell it."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from cluster.openai.tool_reader import Arguments, CallBegins, Piece, ToolReader

CALL_ID_CHARS = 9
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


class ChatTurn:
    """`name` is no other choice's."""

    def __init__(self, reader: ToolReader, name: str) -> None:
        self._reader = reader
        self._name = name
        self._calls = 0

    @property
    def has_called(self) -> bool:
        return self._calls > 0

    def push(self, text: str) -> list[dict[str, Any]]:
        """What more of the text says, as a stream's deltas."""
        return [self._delta(piece) for piece in self._reader.push(text)]

    def end(self) -> list[dict[str, Any]]:
        return [self._delta(piece) for piece in self._reader.end()]

    def whole(self, text: str) -> dict[str, Any]:
        """What a message of `text` holds."""
        content, calls = "", list[dict[str, Any]]()
        for delta in [*self.push(text), *self.end()]:
            content += delta.get("content", "")
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    calls.append({key: part[key] for key in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        return {"content": content or None, "tool_calls": calls} if calls else {"content": content}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case CallBegins(name=name):
                self._calls += 1
                call = {"id": self._call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
            case Arguments(text=text):
                call = {"function": {"arguments": text}}
            case _:
                return {"content": piece}
        return {"tool_calls": [{"index": self._calls - 1, **call}]}

    def _call_id(self) -> str:
        """As short as the strictest of templates (Mistral's) wants it."""
        digest = blake2b(f"{self._name}/{self._calls}".encode(), digest_size=CALL_ID_CHARS).digest()
        return "".join(ALPHABET[byte % len(ALPHABET)] for byte in digest)
