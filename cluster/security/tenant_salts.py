"""The salt under which a request's prefix is cached: bound to its tenant, and known to the gateway alone.

    salt = H(secret; tenant, the request's own salt)

A tenant chooses among its own salts by `cache_salt`, and can neither name nor guess another's: not with the other's
`cache_salt`, and not by trying, as the secret is not known. So a hit says nothing of what others have asked.
"""

from __future__ import annotations

import secrets
from hashlib import blake2b
from pathlib import Path

from engine.errors import ConfigError

SECRET_BYTES_MIN = 32
SALT_BYTES = 32


class TenantSalts:
    """Salts under one secret. Gateways that share workers share prefixes where they have the same secret."""

    def __init__(self, secret: bytes) -> None:
        # A secret of any length becomes a key.
        self._key = blake2b(secret, digest_size=64, person=b"tandem-tenants").digest()

    def salt(self, tenant: str, own_salt: bytes) -> bytes:
        """What stands for `own_salt` of a request of `tenant`."""
        name = tenant.encode()
        # The name's length, or one tenant's name could go on in its salt and be another's.
        data = len(name).to_bytes(4, "little") + name + own_salt
        return blake2b(data, digest_size=SALT_BYTES, key=self._key).digest()


def tenant_salts(file: Path | None) -> TenantSalts:
    """By the secret in `file`, or where that is None by a new one. Raises ConfigError."""
    if file is None:
        return TenantSalts(secrets.token_bytes(SECRET_BYTES_MIN))
    try:
        secret = file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigError(
            f"{file}: got {len(secret)} bytes, expected at least {SECRET_BYTES_MIN}, as `openssl rand -hex 32` gives"
        )
    return TenantSalts(secret)
