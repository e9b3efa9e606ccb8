"""A vocabulary of 97 tokens that can spell any ASCII text: printable characters, a line break, and the end."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.detokenizer import BYTE_OF_CHARACTER
from engine.tokenizer import Tokenizer

SPELLED = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
END = 96


def ascii_tokenizer(*special: str, plain: Sequence[str] = ()) -> Tokenizer:
    """With tokens `special` after the end, which are no text, and `plain` ones, which are not marked so."""
    vocab = {SPELLED[byte]: index for index, byte in enumerate([*range(32, 127), 10])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in ("<end>", *special)])
    backend.add_tokens([tokenizers.AddedToken(text, special=False) for text in plain])
    tokenizer = Tokenizer(backend, frozenset({END}))
    assert tokenizer.vocab_size == END + 1 + len(special) + len(plain), "one token for each character"
    return tokenizer
