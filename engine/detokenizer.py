"""Token ids to text while they come: each piece of text is given out as soon as no later token can change it.

    all ids   [ given out as text ........ )[ held: their text may still change )
    push()    returns what became final, flush() the rest; joined they are exactly `tokenizer.decode(all ids)`

What may change depends on the decoder. Byte-level BPE: only an unfinished UTF-8 character, at most 3 bytes.
SentencePiece with byte fallback: the run of byte tokens at the end, since one bad byte turns all of it into U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from engine.tokenizer import BYTE_TOKEN, Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one sequence. Each token costs the same however long the text already is."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._stream: _Stream = _ByteStream() if tokenizer.decoder_steps == ("ByteLevel",) else _Window(tokenizer)
        self._flushed = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is final now, often that of these tokens, possibly none."""
        assert not self._flushed, "tokens after flush: a finished sequence went on"
        pieces = []
        for token_id in token_ids:
            token = None if token_id in self._skipped else self._tokenizer.token_text(token_id)
            # An id that the model can draw but that stands for no text is left out, as decode does.
            if token is not None:
                pieces.append(self._stream.push(token_id, token))
        return "".join(pieces)

    def flush(self) -> str:
        """The text still held back, with U+FFFD for bytes that stayed unfinished. Nothing may be pushed afterwards."""
        assert not self._flushed, "flushed twice"
        self._flushed = True
        return self._stream.flush()


class _Stream(Protocol):
    def push(self, token_id: int, token: str) -> str: ...

    def flush(self) -> str: ...


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their byte, U+0100 and up for the others in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class _ByteStream:
    """Byte-level BPE: tokens are bytes, so an incremental UTF-8 decoder is all it takes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, token: str) -> str:
        return self._decoder.decode(_spelled(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _spelled(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        # An added token is spelled as it is, not in the byte alphabet.
        return token.encode()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What one token adds to a text, as UTF-8 or a part of it; nothing for an id without a text."""
    token = tokenizer.token_text(token_id)
    if token is None:
        return b""
    if tokenizer.decoder_steps == ("ByteLevel",):
        return _spelled(token)
    if BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(token[3:5])
    # After another token: at the start of a text decoders drop a space.
    alone = tokenizer.decode([token_id], skip_special_tokens=False)
    return tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :].encode()


class _Window:
    """Any other decoder: decodes the last few tokens in the context of those before them.

        ids   … [ context )[ held )      context: given out, kept so that the start of `held` is not taken for the start
                                         of the text, where decoders drop a space

    This is the technique of vLLM's and TGI's prefix and read offsets.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._holds_unfinished = "ByteLevel" in tokenizer.decoder_steps
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._held.append(token_id)
        return "" if BYTE_TOKEN.fullmatch(token) else self._give(final=False)

    def flush(self) -> str:
        return self._give(final=True)

    def _give(self, final: bool) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)
        if not final and self._holds_unfinished and text.endswith(UNFINISHED):
            return ""
        if len(text) > len(before):
            self._context, self._held = self._held, []
        return text[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
