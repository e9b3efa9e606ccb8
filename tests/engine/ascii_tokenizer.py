"""A vocabulary of 97 tokens that can spell any ASCII text: printable characters, a line break, and the end."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.detokenizer import BYTE_OF_CHARACTER
from engine.tokenizer import Tokenizer

SPELLED = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
END = 96


def ascii_tokenizer() -> Tokenizer:
    vocab = {SPELLED[byte]: index for index, byte in enumerate([*range(32, 127), 10])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    tokenizer = Tokenizer(backend, frozenset({END}))
    assert tokenizer.vocab_size == END + 1, "one token for each character"
    return tokenizer
