"""Tokens: what counts, and every way in which one may be wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from cluster.security.auth_config import JwtConfig
from cluster.security.jwt_tokens import JwtTokens, parse_verify_keys
from engine.errors import ConfigError, Unauthenticated
from tests.security.credentials import ED25519, OTHER_RSA, P256, RSA, jwk, pem, private_pem, token

PLAIN = JwtConfig(keys_file=Path("f"))
STRICT = JwtConfig(keys_file=Path("f"), issuer="https://login.example", audience="tandem", tenant_claim="org")


def tokens(text: str = pem(RSA), config: JwtConfig = PLAIN) -> JwtTokens:
    return JwtTokens(parse_verify_keys(text, "f"), config)


def refusal(of: JwtTokens, credential: str) -> tuple[str, str]:
    with pytest.raises(Unauthenticated) as caught:
        of.tenant_of(credential)
    return str(caught.value), caught.value.detail


def unsigned(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    """A token by hand, as an attacker makes one."""
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [(RSA, "RS256"), (RSA, "RS512"), (RSA, "PS256"), (P256, "ES256"), (ED25519, "EdDSA")],
)
def test_a_token_names_its_tenant(key: Any, algorithm: str) -> None:
    credential = token(key, algorithm)
    assert tokens(pem(key)).tenant_of(credential) == "acme"
    assert tokens(json.dumps({"keys": [jwk(key, use="sig")]})).tenant_of(token(key, jwk_algorithm(key))) == "acme"


def jwk_algorithm(key: Any) -> str:
    return {type(RSA): "RS256", type(P256): "ES256", type(ED25519): "EdDSA"}[type(key)]


def test_issuer_audience_and_the_tenants_claim_are_as_configured() -> None:
    right = {"iss": "https://login.example", "aud": ["billing", "tandem"], "org": "globex"}
    strict = tokens(config=STRICT)
    assert strict.tenant_of(token(**right)) == "globex"
    for change, detail in (
        ({"iss": "https://evil.example"}, "a token of another issuer"),
        ({"iss": None}, "a token without a claim that is needed"),
        ({"aud": "billing"}, "a token for another audience"),
        ({"aud": None}, "a token without a claim that is needed"),
        ({"org": None}, "a token without a claim that is needed"),
        ({"exp": None}, "a token without a claim that is needed"),
        ({"org": 5}, "a token whose org is no tenant's name"),
        ({"org": ""}, "a token whose org is no tenant's name"),
        ({"org": "two words"}, "a token whose org is no tenant's name"),
        ({"org": ["globex"]}, "a token whose org is no tenant's name"),
        ({"org": "x" * 129}, "a token whose org is no tenant's name"),
        ({"org": "a\nb"}, "a token whose org is no tenant's name"),
        ({"nbf": time.time() + 60}, "a token from the future"),
        ({"iat": time.time() + 60}, "a token from the future"),
        ({"exp": "soon"}, "a malformed token"),
    ):
        assert refusal(strict, token(**{**right, **change})) == ("the key or token is not valid", detail)


def test_a_token_for_somebody_else_does_not_count_where_no_audience_is_configured() -> None:
    assert refusal(tokens(), token(aud="another-service"))[1] == "a token for another audience"


def test_an_expired_token_is_told_apart_only_where_its_signature_is_right() -> None:
    past = time.time() - 3600
    assert refusal(tokens(), token(exp=past)) == ("the token has expired", "an expired token")
    forged = token(OTHER_RSA, exp=past)
    assert refusal(tokens(), forged) == ("the key or token is not valid", "a token with a wrong signature")


def test_clocks_may_differ_a_little() -> None:
    assert tokens().tenant_of(token(exp=time.time() - 5, nbf=time.time() + 5)) == "acme"
    assert refusal(tokens(), token(exp=time.time() - 15))[1] == "an expired token"


CLAIMS = {"sub": "acme", "exp": 1e11}


@pytest.mark.parametrize("name", ["none", "None", "NONE", "", None, 7, ["RS256"], {"a": 1}])
def test_a_token_without_a_signature_does_not_count(name: object) -> None:
    assert refusal(tokens(), unsigned({"alg": name, "typ": "JWT"}, CLAIMS))[0] == "the key or token is not valid"


@pytest.mark.parametrize("secret", [pem(RSA).encode(), pem(RSA).encode().strip(), b""])
def test_a_token_signed_with_the_public_key_as_a_shared_secret_does_not_count(secret: bytes) -> None:
    body = unsigned({"alg": "HS256", "typ": "JWT"}, CLAIMS).rpartition(".")[0]
    signature = hmac.new(secret, body.encode(), hashlib.sha256).digest()
    forged = f"{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    for of in (tokens(), tokens(json.dumps({"keys": [jwk(RSA, kid="1")]}))):
        assert refusal(of, forged) == ("the key or token is not valid", "a token with a wrong signature")


def test_a_key_in_the_tokens_own_header_is_not_asked() -> None:
    own = {"jwk": jwk(OTHER_RSA), "jku": "https://evil.example/keys", "x5u": "https://evil.example/key"}
    assert refusal(tokens(), token(OTHER_RSA, headers=own))[1] == "a token with a wrong signature"


def test_claims_changed_after_signing_do_not_count() -> None:
    header, _, signature = token().split(".")
    claims = base64.urlsafe_b64encode(json.dumps({**CLAIMS, "sub": "root"}).encode()).rstrip(b"=").decode()
    assert refusal(tokens(), f"{header}.{claims}.{signature}")[1] == "a token with a wrong signature"


def test_critical_headers_that_nobody_knows_are_refused() -> None:
    credential = token(headers={"crit": ["exp-2"], "exp-2": 1})
    assert refusal(tokens(), credential)[1] == "a malformed token"


def test_a_huge_token_is_not_even_parsed() -> None:
    assert refusal(tokens(), token(padding="x" * 9000))[1] == "a token that is too long, or no ASCII"


def test_keys_are_chosen_by_name_and_those_without_one_are_all_tried() -> None:
    named = json.dumps({"keys": [jwk(RSA, kid="old"), jwk(OTHER_RSA, kid="new"), jwk(P256)]})
    of = tokens(named)
    assert of.tenant_of(token(OTHER_RSA, headers={"kid": "new"})) == "acme"
    assert of.tenant_of(token(OTHER_RSA)) == "acme"
    assert of.tenant_of(token(P256, "ES256", headers={"kid": "whatever"})) == "acme"
    assert refusal(of, token(OTHER_RSA, headers={"kid": "old"}))[1] == "a token with a wrong signature"
    assert refusal(of, token(OTHER_RSA, headers={"kid": "gone"}))[1] == "a token with a wrong signature"
    both = pem(RSA) + "\n" + pem(P256) + pem(OTHER_RSA)
    for credential in (token(), token(OTHER_RSA), token(P256, "ES256")):
        assert tokens(both).tenant_of(credential) == "acme"


def test_a_key_with_an_algorithm_of_its_own_verifies_no_other() -> None:
    of = tokens(json.dumps({"keys": [jwk(RSA, alg="RS512")]}))
    assert of.tenant_of(token(algorithm="RS512")) == "acme"
    assert refusal(of, token(algorithm="RS256"))[1] == "a token with a wrong signature"


SMALL = rsa.generate_private_key(65537, 1024)
ODD_CURVE = ec.generate_private_key(ec.SECP256K1())
DSA = dsa.generate_private_key(2048)
# Of the curve sect163k1, which the library does not know.
UNKNOWN_CURVE = "-----BEGIN PUBLIC KEY-----\nMBcwEAYHKoZIzj0CAQYFK4EEAAEDAwAEAA==\n-----END PUBLIC KEY-----\n"
SHARED = {"kty": "oct", "k": "c2VjcmV0"}
PRIVATE = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(RSA))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no key"),
        ("ssh-rsa AAAA", "holds no key"),
        ('{"keys": []}', "holds no key"),
        ('{"keys": 5}', "holds no key"),
        (json.dumps({"keys": [{**jwk(RSA), "use": "enc"}]}), "holds no key"),
        ("{", "is no JWKS"),
        ('{"key": 1}', "is no JWKS"),
        ('{"keys": [5]}', "the 1. signing key is no JSON object"),
        ('{"keys": [{"kty": "RSA"}]}', "the 1. signing key cannot be read"),
        ('{"keys": [{"kty": "RSA", "alg": []}]}', "the 1. signing key cannot be read"),
        (json.dumps({"keys": [jwk(P256), SHARED]}), "the 2. signing key is secret, expected public keys only"),
        (json.dumps({"keys": [PRIVATE]}), "the 1. signing key is secret, expected public keys only"),
        (json.dumps({"keys": [jwk(RSA, alg="ES256")]}), "the 1. signing key cannot be read"),
        (private_pem(RSA), "got a block of the kind 'PRIVATE KEY', expected 'PUBLIC KEY' and no others"),
        (pem(RSA) + private_pem(P256), "got a block of the kind 'PRIVATE KEY'"),
        (pem(P256) + pem(SMALL), "the 2. public key: got 1024 bits of RSA, expected at least 2048"),
        (pem(ODD_CURVE), "the 1. public key: expected RSA, Ed25519, or one of the curves"),
        (pem(DSA), "the 1. public key: expected RSA, Ed25519, or one of the curves"),
        (pem(RSA).replace("M", "A"), "the 1. public key cannot be read"),
        (pem(RSA) + UNKNOWN_CURVE, "the 2. public key cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_of_it_shown(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_verify_keys(text, "/etc/jwks")
    assert str(caught.value).startswith(f"/etc/jwks: {problem}")
    assert str(PRIVATE["d"])[:20] not in str(caught.value)


@given(st.text() | st.lists(st.text(max_size=20), min_size=3, max_size=3).map(".".join))
def test_any_text_is_no_token(text: str) -> None:
    refusal(tokens(), text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(
    st.fixed_dictionaries({"alg": st.sampled_from(["RS256", "PS256"])}, optional={"kid": JSON, "crit": JSON}),
    st.dictionaries(st.sampled_from(["exp", "nbf", "iat", "aud", "iss", "sub", "jti"]), JSON),
)
def test_any_claims_signed_with_the_right_key_are_a_tenants_or_refused(header: Any, claims: Any) -> None:
    """What a provider signs by mistake must not become an error of ours."""
    if header.get("kid", "") is None or not isinstance(header.get("kid", ""), str):
        header.pop("kid")
    header.pop("crit", None)
    payload = json.dumps(claims).encode()
    credential = jwt.api_jws.encode(payload, RSA, header["alg"], header)
    try:
        tenant = tokens().tenant_of(credential)
    except Unauthenticated:
        return
    assert tenant == claims["sub"]
    assert int(claims["exp"]) > time.time() - 20
