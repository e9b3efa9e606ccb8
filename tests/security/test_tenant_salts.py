"""Salts of tenants: each tenant has its own, and nobody can name another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.security.tenant_salts import SALT_BYTES, TenantSalts, tenant_salts
from engine.errors import ConfigError

SECRET = b"0123456789abcdef" * 2
SALTS = TenantSalts(SECRET)
# Few letters, so that names and salts are often parts of one another.
NAMES = st.text("ab\0", max_size=4)
OWN = st.binary(max_size=4) | st.text("ab\0", max_size=4).map(str.encode)


@given(NAMES, OWN, NAMES, OWN)
def test_two_requests_share_a_salt_where_tenant_and_own_salt_are_equal(
    tenant: str, own: bytes, other: str, others: bytes
) -> None:
    assert (SALTS.salt(tenant, own) == SALTS.salt(other, others)) == ((tenant, own) == (other, others))
    assert len(SALTS.salt(tenant, own)) == SALT_BYTES


def test_a_salt_that_was_seen_is_of_no_use_as_ones_own() -> None:
    stolen = SALTS.salt("acme", b"")
    assert SALTS.salt("globex", stolen) != stolen
    assert SALTS.salt("", stolen) != stolen


def test_without_the_secret_a_salt_cannot_be_computed() -> None:
    assert TenantSalts(SECRET[:-1] + b"x").salt("acme", b"") != SALTS.salt("acme", b"")
    assert TenantSalts(SECRET).salt("acme", b"") == SALTS.salt("acme", b"")
    assert SECRET.decode() not in repr(SALTS) + repr(vars(SALTS))


def test_the_secret_is_a_files_or_new(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    assert tenant_salts(file).salt("acme", b"") == SALTS.salt("acme", b"")
    assert tenant_salts(None).salt("acme", b"") != tenant_salts(None).salt("acme", b"")
    file.write_bytes(b"short secret\n")
    with pytest.raises(ConfigError, match="secret: got 12 bytes, expected at least 32") as caught:
        tenant_salts(file)
    assert "short secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        tenant_salts(tmp_path / "none")
