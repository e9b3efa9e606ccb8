"""A gateway that is open to others says so when it starts."""

from __future__ import annotations

import pytest

from cluster.config import TandemConfig
from cluster.security.clear_text import clear_text_warning

KEYS = {"gateway": {"auth": {"keys_file": "keys"}}}
CERTS = {"security": {"client_certs": "certs"}}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.9.1"])
def test_what_only_this_machine_reaches_is_nobodys_business(host: str):
    assert clear_text_warning(TandemConfig.model_validate(KEYS), host) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "node-7"])
def test_what_others_reach_in_clear_is_told(host: str):
    assert "keys come in clear" in (clear_text_warning(TandemConfig.model_validate(KEYS), host) or "")
    assert "may use this service" in (clear_text_warning(TandemConfig(), host) or "")
    assert clear_text_warning(TandemConfig.model_validate(KEYS | CERTS), host) is None
