"""API keys: what they look like, and the file that holds their hashes.

    tandem_<id>_<secret>           a key, known to its client alone
    <id> <tenant> <SHA-256 of it>  its line in the file; # begins a comment

The id says which line a key is compared with: it is in the file and may be in a log, and helps nobody to guess. The
secret is 256 random bits, so one fast hash keeps it: there are no likely keys that could be tried, as there are likely
passwords, against which slow and salted hashes are made.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from cluster.security.caller import MAX_TENANT_CHARS, NOT_VALID, is_tenant_name
from engine.errors import ConfigError, Unauthenticated

PREFIX = "tandem_"
ID_BYTES, SECRET_BYTES = 6, 32
KEY = re.compile(rf"{PREFIX}([0-9a-f]{{{2 * ID_BYTES}}})_[\w-]{{43}}", re.ASCII)
ID = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HashedKey:
    """One line of the file."""

    tenant: str
    digest: bytes = field(repr=False)


# A key whose id nobody has is compared all the same.
NOBODY = HashedKey("", bytes(32))


class ApiKeys:
    """The keys that count, by id."""

    def __init__(self, keys: Mapping[str, HashedKey]) -> None:
        self._keys = keys

    def tenant_of(self, key: str) -> str:
        """Whose key it is. Raises Unauthenticated. How long it takes says nothing of the secret: digests are compared,
        whole, and one each time."""
        match = KEY.fullmatch(key)
        if match is None:
            raise Unauthenticated(NOT_VALID, "a malformed API key")
        known = self._keys.get(match[1], NOBODY)
        if not hmac.compare_digest(sha256(key.encode()).digest(), known.digest) or known is NOBODY:
            raise Unauthenticated(NOT_VALID, "an API key with an unknown id" if known is NOBODY else "a wrong API key")
        return known.tenant


def parse_keys(text: str, where: str) -> ApiKeys:
    """The keys in a file's text. Raises ConfigError that names the line and never shows it: it may hold a key that
    somebody put there by mistake."""
    keys: dict[str, HashedKey] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or not (ID.fullmatch(words[0]) and is_tenant_name(words[1]) and HASH.fullmatch(words[2])):
            raise ConfigError(f"{where}:{number}: expected a line as `tandem keys new` writes it: ID TENANT SHA256")
        if words[0] in keys:
            raise ConfigError(f"{where}:{number}: the id {words[0]} is there twice")
        keys[words[0]] = HashedKey(words[1], bytes.fromhex(words[2]))
    return ApiKeys(keys)


def new_key(tenant: str, file: Path) -> str:
    """A new key of `tenant`; its hash is added to `file`, which is made where there is none. Raises ConfigError."""
    if not is_tenant_name(tenant):
        raise ConfigError(f"--tenant: got {tenant!r}, expected a word of 1 to {MAX_TENANT_CHARS} characters without #")
    key_id = secrets.token_hex(ID_BYTES)
    key = f"{PREFIX}{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    line = f"{key_id} {tenant} {sha256(key.encode()).hexdigest()}\n"
    try:
        # One write to the end, so that two commands at once, or a gateway that reads meanwhile, see whole lines.
        with os.fdopen(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b", buffering=0) as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - 1))
            opened.write(line.encode() if opened.read(1) in (b"", b"\n") else b"\n" + line.encode())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from None
    return key
