"""JSON Web Tokens: which tenant a token is of. PyJWT checks them; here stand the keys, and what is demanded.

A key says by its own type which algorithms it verifies, all of them by public keys: no token can choose `none`, or have
a public key taken for a shared secret. Imported only where tokens are configured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from cluster.security.auth_config import JwtConfig
from cluster.security.caller import NOT_VALID, is_tenant_name
from engine.errors import ConfigError, Unauthenticated

PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey
# How far the provider's clock may differ from this machine's.
LEEWAY_S = 10.0
# gRPC's own limit of a call's metadata is 8 KiB.
MAX_TOKEN_CHARS = 8192
RSA_BITS_MIN = 2048
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
CURVE_ALGORITHMS = {"secp256r1": ("ES256",), "secp384r1": ("ES384",), "secp521r1": ("ES512",)}
PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)

# What the log says of a token, by what PyJWT found: words of ours, as the token's own may be anything.
PROBLEMS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "an expired token"),
    (jwt.ImmatureSignatureError, "a token from the future"),
    (jwt.InvalidAudienceError, "a token for another audience"),
    (jwt.InvalidIssuerError, "a token of another issuer"),
    (jwt.MissingRequiredClaimError, "a token without a claim that is needed"),
    (jwt.InvalidSignatureError, "a token with a wrong signature"),
)


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """`kid` None: it may have signed any token."""

    key: PublicKey
    algorithms: tuple[str, ...]
    kid: str | None = None


class JwtTokens:
    """Tokens signed with one of `keys`."""

    def __init__(self, keys: Sequence[VerifyKey], config: JwtConfig) -> None:
        self._keys = keys
        self._config = config

    def tenant_of(self, token: str) -> str:
        """Raises Unauthenticated. Only of a token that was right once is it said that it has expired."""
        if len(token) > MAX_TOKEN_CHARS or not token.isascii():
            raise Unauthenticated(NOT_VALID, "a token that is too long, or no ASCII")
        try:
            tenant = self._claims(token)[self._config.tenant_claim]
        except jwt.PyJWTError as error:
            problem = next((words for kind, words in PROBLEMS if isinstance(error, kind)), "a malformed token")
            expired = isinstance(error, jwt.ExpiredSignatureError)
            raise Unauthenticated("the token has expired" if expired else NOT_VALID, problem) from None
        if not is_tenant_name(tenant):
            raise Unauthenticated(NOT_VALID, f"a token whose {self._config.tenant_claim} is no tenant's name")
        assert isinstance(tenant, str)
        return tenant

    def _claims(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        kid = header.get("kid")
        for key in self._keys:
            if header.get("alg") not in key.algorithms or (kid is not None and key.kid not in (None, kid)):
                continue
            try:
                return jwt.decode(
                    token,
                    key.key,
                    # Of the key, not of the token.
                    algorithms=list(key.algorithms),
                    options={"require": ["exp", self._config.tenant_claim]},
                    issuer=self._config.issuer,
                    audience=self._config.audience,
                    leeway=LEEWAY_S,
                )
            except jwt.InvalidSignatureError:
                # Files may hold several keys without names: while keys change, the old one and the new.
                continue
        raise jwt.InvalidSignatureError


def parse_verify_keys(text: str, where: str) -> list[VerifyKey]:
    """The public keys in a file's text, PEM or a JWKS. Raises ConfigError, which never shows any of it."""
    keys = _from_jwks(text, where) if text.lstrip().startswith("{") else _from_pem(text, where)
    if not keys:
        raise ConfigError(f"{where}: holds no key, expected PEM blocks `PUBLIC KEY`, or a JWKS")
    return keys


def _from_pem(text: str, where: str) -> list[VerifyKey]:
    keys: list[VerifyKey] = []
    for block in PEM.finditer(text):
        if block[1] not in ("PUBLIC KEY", "RSA PUBLIC KEY"):
            raise ConfigError(f"{where}: got a block of the kind {block[1]!r}, expected 'PUBLIC KEY' and no others")
        try:
            key = load_pem_public_key(block[0].encode())
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigError(f"{where}: the {_nth(keys)} public key cannot be read") from None
        keys.append(_verify_key(key, None, None, f"{where}: the {_nth(keys)} public key"))
    return keys


def _from_jwks(text: str, where: str) -> list[VerifyKey]:
    try:
        entries = json.loads(text)["keys"]
    except (ValueError, KeyError, RecursionError):
        raise ConfigError(f"{where}: is no JWKS, expected a JSON object with `keys`") from None
    keys: list[VerifyKey] = []
    for entry in entries if isinstance(entries, list) else []:
        name = f"{where}: the {_nth(keys)} signing key"
        if not isinstance(entry, dict):
            raise ConfigError(f"{name} is no JSON object")
        if entry.get("use", "sig") != "sig":
            continue
        # A private key is none of a gateway's business, and a shared one would let it sign tokens itself.
        if entry.get("kty") == "oct" or "d" in entry:
            raise ConfigError(f"{name} is secret, expected public keys only")
        kid, algorithm = entry.get("kid"), entry.get("alg")
        try:
            key = jwt.PyJWK(entry).key
        except (jwt.PyJWTError, TypeError):
            raise ConfigError(f"{name} cannot be read") from None
        keys.append(_verify_key(key, kid if isinstance(kid, str) else None, algorithm, name))
    return keys


def _verify_key(key: object, kid: str | None, algorithm: object, name: str) -> VerifyKey:
    algorithms: tuple[str, ...] = ()
    match key:
        case RSAPublicKey() if key.key_size < RSA_BITS_MIN:
            raise ConfigError(f"{name}: got {key.key_size} bits of RSA, expected at least {RSA_BITS_MIN}")
        case RSAPublicKey():
            algorithms = RSA_ALGORITHMS
        case EllipticCurvePublicKey() if key.curve.name in CURVE_ALGORITHMS:
            algorithms = CURVE_ALGORITHMS[key.curve.name]
        case Ed25519PublicKey():
            algorithms = ("EdDSA",)
        case _:
            raise ConfigError(f"{name}: expected RSA, Ed25519, or one of the curves P-256, P-384 and P-521")
    if algorithm is not None:
        algorithms = tuple(name for name in algorithms if name == algorithm)
    if not algorithms:
        raise ConfigError(f"{name}: its `alg` does not go with its type")
    return VerifyKey(key, algorithms, kid)


def _nth(keys: Sequence[VerifyKey]) -> str:
    return f"{len(keys) + 1}."
