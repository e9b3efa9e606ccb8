"""One request of a load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

# Roles and contents, in order.
Chat: TypeAlias = tuple[tuple[str, str], ...]
# Text, token ids, or a chat.
Prompt: TypeAlias = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """`arrival_s` counts from the start of the run. `prompt_tokens` is 0 where only the server can count them."""

    index: int
    arrival_s: float
    prompt: Prompt
    prompt_tokens: int
    output_tokens: int


def chat_of(prompt: Prompt) -> list[dict[str, str]] | None:
    """A chat as services take it; None for text and token ids."""
    if isinstance(prompt, str):
        return None
    return [{"role": turn[0], "content": turn[1]} for turn in prompt if isinstance(turn, tuple)] or None


def token_ids_of(prompt: Prompt) -> list[int]:
    """The token ids of a prompt that is made of them; else none."""
    return [] if isinstance(prompt, str) else [item for item in prompt if isinstance(item, int)]
