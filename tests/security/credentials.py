"""Keys, tokens and the files that a gateway knows them by, for tests."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def pem(key: PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def private_pem(key: PrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def jwk(key: PrivateKey, **more: Any) -> dict[str, Any]:
    """The public half as an entry of a JWKS."""
    kinds = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256", ed25519.Ed25519PrivateKey: "EdDSA"}
    name = next(name for kind, name in kinds.items() if isinstance(key, kind))
    return {**json.loads(jwt.get_algorithm_by_name(name).to_jwk(key.public_key())), **more}


def token(key: Any = RSA, algorithm: str = "RS256", headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token of tenant acme that expires in a minute, unless the claims say otherwise; a claim of None is left out."""
    all_claims = {"sub": "acme", "exp": time.time() + 60, **claims}
    present = {name: value for name, value in all_claims.items() if value is not None}
    return jwt.encode(present, key, algorithm, headers)


def key_file(folder: Path, *tenants: str) -> tuple[Path, dict[str, str]]:
    """A file with a key of each tenant, and the keys."""
    from cluster.security.api_keys import new_key

    file = folder / "keys"
    file.touch()
    return file, {tenant: new_key(tenant, file) for tenant in tenants}
