"""Small vocabularies built by hand, as GGUF metadata: byte-level and SentencePiece."""

from __future__ import annotations

from typing import Any

from engine import gguf_tokenizer
from engine.chat_template import ChatTemplate
from engine.detokenizer import BYTE_OF_CHARACTER
from engine.gguf_tokenizer import TokenType
from engine.tokenizer import Ends, Tokenizer

ALPHABET = [character for character, _ in sorted(BYTE_OF_CHARACTER.items(), key=lambda item: item[1])]


def byte_level_metadata() -> dict[str, Any]:
    """Ids 0-2 are control tokens, 3 is user-defined, then all 256 bytes, then five merged tokens."""
    merges = ["h e", "Ġ t", "he l", "Ġt he", "ð Ł"]
    tokens = ["<|end|>", "<|start|>", "<｜odd spelling｜>", "<think>", *ALPHABET]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED] + [TokenType.NORMAL] * (len(tokens) - 4)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """Ids 0-2 are <unk>, <s>, </s>; 3-258 the bytes; then pieces, the better the earlier."""
    pieces = ["▁t", "he", "▁the", "lo", "▁he", "▁", "h", "e", "t", "l", "o", "é", "你"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def build(metadata: dict[str, Any], chat_template: str = "") -> Tokenizer:
    backend, special = gguf_tokenizer.build(metadata, "tiny.gguf")
    chat = ChatTemplate(chat_template, {}, "tiny.gguf") if chat_template else None
    return Tokenizer(backend, frozenset(special.eos), special.bos, Ends(special.first, special.last), chat)
