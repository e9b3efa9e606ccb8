"""A vocabulary of 97 tokens that can spell any ASCII text: printable characters, a line break, and the end."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.detokenizer import BYTE_OF_CHARACTER
from engine.tokenizer import Tokenizer

SPELLED = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
END = 96


def ascii_tokenizer(*special: str) -> Tokenizer:
    """With tokens `special` after the end, which are no text."""
    vocab = {SPELLED[byte]: index for index, byte in enumerate([*range(32, 127), 10])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in ("<end>", *special)])
    tokenizer = Tokenizer(backend, frozenset({END}))
    assert tokenizer.vocab_size == END + 1 + len(special), "one token for each character"
    return tokenizer
