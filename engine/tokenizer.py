"""Text to token ids and back, with the model's own vocabulary and chat template.

Reads tokenizer.json of a Hugging Face folder, or the vocabulary inside a GGUF file; of the latter only the header, so
that a gateway starts without touching the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from engine import gguf_tokenizer
from engine.chat_template import FIXED_NOW, ChatTemplate, check_messages
from engine.errors import InvalidArgument, ModelFileError
from engine.fields import Fields
from engine.gguf_file import GGUFFile
from engine.json_file import read_json_object
from engine.model_source import ModelFiles
from engine.tools import HERMES, Tool, ToolSyntax

# Steps of a decoder whose output for a run of tokens is known before the tokens after it are (see detokenizer.py).
KNOWN_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Ends:
    """Token ids that `encode` puts before and after a text."""

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


class Tokenizer:
    """One model's vocabulary. Immutable after construction, so any number of requests may share it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: frozenset[int],
        bos_token_id: int | None = None,
        ends: Ends | None = None,
        chat_template: ChatTemplate | None = None,
        model_vocab_size: int = 0,
        where: str = "tokenizer",
    ) -> None:
        """`ends` None leaves the special tokens around a text to the backend's own post-processor.

        `model_vocab_size` is the number of logits, which may exceed the number of tokens that have a text. `where`
        names the file in errors. Raises ModelFileError for a decoder that tokens cannot be streamed through.
        """
        self._backend = backend
        self._ends = ends
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id
        self.vocab_size = max(model_vocab_size, 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1))
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.decoder_steps = _decoder_steps(backend, where)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelled out in it become those tokens.

        Raises InvalidArgument for text that is not valid Unicode (lone surrogates: what invalid UTF-8 decodes to).
        """
        _check_text("text", text)
        return self._encode(text, add_special_tokens)

    @property
    def tool_syntax(self) -> ToolSyntax:
        """How the model is to write calls of tools."""
        return self._chat_template.tool_syntax if self._chat_template is not None else HERMES

    def special_id(self, text: str) -> int | None:
        """The special token that is spelled so; None where there is none."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self.special_token_ids else None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], now: datetime = FIXED_NOW, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Token ids of the conversation, ready for the assistant's answer. `now` is what the template may print,
        `tools` what the answer may call.

        Raises InvalidArgument for malformed messages, and where the model has no chat template.
        """
        if self._chat_template is None:
            raise InvalidArgument("messages", len(messages), "a plain prompt: this model has no chat template")
        check_messages(messages)
        for index, message in enumerate(messages):
            for key, text in message.items():
                if isinstance(text, str):
                    _check_text(f"messages[{index}].{key}", text)
        text = self._chat_template.render(messages, now, tools=tools)
        _check_text("messages", text)
        # The template spells out all special tokens that are wanted.
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD. Ids without a text give nothing.

        Raises InvalidArgument for ids outside [0, vocab_size).
        """
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidArgument("token_ids", token_id, f"a token id in [0, {self.vocab_size})")
        # As in `_encode`.
        text: str = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]
        return text

    def token_text(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("Ġthe", "▁the", "<0x0A>"), None where it has no text."""
        text: str | None = self._backend.id_to_token(token_id)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        wrapped = add_special_tokens and self._ends is None
        # Of the backend's methods only those for batches let go of the interpreter: others may run meanwhile. This one
        # also does without offsets, which takes a third of the time.
        token_ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=wrapped)[0].ids
        if add_special_tokens and self._ends is not None:
            return [*self._ends.first, *token_ids, *self._ends.last]
        return token_ids


def load(files: ModelFiles) -> Tokenizer:
    """The tokenizer of a model. Raises ModelFileError for files that are missing, corrupt or of an unknown kind."""
    return _load_gguf(files.path) if files.kind == "gguf" else _load_folder(files.path)


def _load_gguf(path: Path) -> Tokenizer:
    metadata = GGUFFile(path).metadata
    backend, special = gguf_tokenizer.build(metadata, str(path))
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    names = {name: _gguf_token(metadata, name, tokens) for name in ("bos", "eos", "unknown", "padding")}
    source = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        frozenset(special.eos),
        special.bos,
        Ends(special.first, special.last),
        _chat_template(source, dict(zip(SPECIAL_NAMES, names.values(), strict=True)), str(path)),
        where=str(path),
    )


def _gguf_token(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None


def _load_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    backend = _read_backend(path)
    # Some files carry the settings of a training run; here no text is ever cut or filled up silently.
    backend.no_truncation()
    backend.no_padding()
    config = _optional(folder / "tokenizer_config.json")
    names = {name: _token_name(config.get(name)) for name in SPECIAL_NAMES}
    ids = {name: backend.token_to_id(text) if text else None for name, text in names.items()}
    model_config = read_json_object(folder / "config.json")
    return Tokenizer(
        backend,
        _eos_ids(folder, model_config, ids["eos_token"]),
        ids["bos_token"],
        _ends(config, ids["bos_token"], ids["eos_token"]),
        _chat_template(_folder_template(folder, config), names, str(folder)),
        Fields(model_config, str(folder / "config.json")).count("vocab_size", default=1),
        str(path),
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    read_json_object(path)  # Says which file is missing or broken better than the package does.
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The tokenizers package raises bare Exception for all that is wrong with a file.
        raise ModelFileError(path, f"not a tokenizer this version of tokenizers can read: {error}") from error


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _token_name(value: object) -> str | None:
    """A special token is written as a string, or as a mapping with its text under "content"."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _ends(config: Mapping[str, Any], bos: int | None, eos: int | None) -> Ends | None:
    """Flags, where a config has them, overrule tokenizer.json's post-processor, as in transformers."""
    if not {"add_bos_token", "add_eos_token"} & config.keys():
        return None
    return Ends(
        (bos,) if config.get("add_bos_token") and bos is not None else (),
        (eos,) if config.get("add_eos_token") and eos is not None else (),
    )


def _eos_ids(folder: Path, model_config: Mapping[str, Any], tokenizer_eos: int | None) -> frozenset[int]:
    """What generation_config.json says, else config.json; and the tokenizer's own end token in any case."""
    path = folder / "generation_config.json"
    ids = Fields(_optional(path), str(path)).token_ids("eos_token_id")
    ids = ids or Fields(model_config, str(folder / "config.json")).token_ids("eos_token_id")
    return frozenset(ids if tokenizer_eos is None else [*ids, tokenizer_eos])


def _folder_template(folder: Path, config: Mapping[str, Any]) -> object:
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.exists():
        return jinja_file.read_text(encoding="utf-8")
    return _optional(folder / "chat_template.json").get("chat_template", config.get("chat_template"))


def _chat_template(source: object, special_tokens: Mapping[str, str | None], where: str) -> ChatTemplate | None:
    if isinstance(source, list):
        # Several named templates: "default" is the one for plain chat.
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelFileError(where, f"its chat template is {type(source).__name__}, expected a string")
    return ChatTemplate(source, {name: text for name, text in special_tokens.items() if text is not None}, where)


def _decoder_steps(backend: tokenizers.Tokenizer, where: str) -> tuple[str, ...]:
    """Names of the decoder's steps in order; empty without a decoder."""
    if backend.decoder is None:
        return ()
    # The package shows a decoder's make-up only in its pickled form, which is JSON.
    state = json.loads(backend.decoder.__getstate__())
    steps = tuple(step["type"] for step in state.get("decoders", [state]))
    for step in steps:
        if step not in KNOWN_DECODERS:
            raise ModelFileError(where, f"decoder {step} is not supported; known: {', '.join(KNOWN_DECODERS)}")
    return steps


def _check_text(field: str, text: str) -> None:
    if not isinstance(text, str):
        raise InvalidArgument(field, text, "a string")
    # Lone surrogates are all that UTF-8 cannot encode.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                field,
                text[error.start : error.start + 1],
                f"valid Unicode; character {error.start} is a lone surrogate",
            ) from error
