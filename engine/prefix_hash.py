"""Names of KV blocks by content: a chain, so that a block's name covers everything before it.

    root = H(salt),  name[i] = H(name[i-1], tokens of block i)

The salt keeps tenants apart: equal prompts under different salts share no name, so a cache hit tells nobody anything.
H is BLAKE2b with 128 bits: a forged collision would serve one prompt's KV to another, so a fast weak hash will not do.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def root(salt: bytes) -> bytes:
    """The name of the empty prefix under `salt`."""
    return blake2b(salt, digest_size=DIGEST_BYTES, person=b"tandem-kv-root").digest()


def extend(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of the block that holds `token_ids` and follows the block named `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def chain(token_ids: Sequence[int], block_size: int, salt: bytes) -> Iterator[bytes]:
    """Names of the full blocks of `token_ids`, in order, computed as they are asked for."""
    name = root(salt)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        name = extend(name, token_ids[start : start + block_size])
        yield name
