"""Who calls: which credential of a call counts, and files that change while the gateway runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.security.api_keys import ApiKeys, parse_keys
from cluster.security.auth_config import AuthConfig, JwtConfig
from cluster.security.caller import Caller
from cluster.security.clients import Clients, credential_of
from engine.errors import ConfigError, Unauthenticated
from tests.security.credentials import OTHER_RSA, RSA, key_file, pem, token


def bearer(credential: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {credential}")]


def detail(clients: Clients, credential: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        clients.caller(bearer(credential))
    return caught.value.detail


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Bearer k")],
        [("authorization", "bearer   k ")],
        [("authorization", "BEARER k")],
        [("x-api-key", "k")],
        [("x-api-key", b"k"), ("other", "x")],
    ],
)
def test_a_credential_is_a_bearers_or_a_keys(metadata: list[tuple[str, str | bytes]]) -> None:
    assert credential_of(metadata) == "k"


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ([], "no credential"),
        ([("Authorization", "Bearer k")], "no credential"),
        ([("x-api-key", " ")], "no credential"),
        ([("authorization", "Bearer")], "no credential"),
        ([("authorization", "k")], "another scheme than Bearer"),
        ([("authorization", "Basic azpr")], "another scheme than Bearer"),
        ([("authorization", "Bearer k"), ("x-api-key", "k")], "several credentials at once"),
        ([("authorization", "Bearer k"), ("authorization", "Bearer l")], "several credentials at once"),
    ],
)
def test_a_call_without_one_is_told_what_is_expected(metadata: list[tuple[str, str | bytes]], problem: str) -> None:
    with pytest.raises(Unauthenticated, match=r"^expected metadata `authorization: Bearer` with an API key") as caught:
        credential_of(metadata)
    assert caught.value.detail == problem


def test_any_metadata_is_a_callers_or_refused(tmp_path: Path) -> None:
    file, keys = key_file(tmp_path, "acme")
    (tmp_path / "pem").write_text(pem(RSA))
    clients = Clients(AuthConfig(keys_file=file, jwt=JwtConfig(keys_file=tmp_path / "pem")))
    good = st.sampled_from([keys["acme"], token()])
    value = st.text() | st.binary() | good | st.builds("{} {}".format, st.sampled_from(["Bearer", "bearer"]), good)

    @given(st.lists(st.tuples(st.sampled_from(["authorization", "x-api-key", "x"]), value), max_size=3))
    def check(metadata: list[tuple[str, str | bytes]]) -> None:
        try:
            caller = clients.caller(metadata)
        except Unauthenticated:
            return
        assert caller.tenant == "acme"

    check()


def test_keys_and_tokens_name_the_same_tenants(tmp_path: Path) -> None:
    file, keys = key_file(tmp_path, "acme", "ops")
    (tmp_path / "pem").write_text(pem(RSA))
    jwt = JwtConfig(keys_file=tmp_path / "pem")
    both = Clients(AuthConfig(keys_file=file, jwt=jwt, operators=("ops",)))
    assert both.caller(bearer(keys["acme"])) == both.caller(bearer(token())) == Caller("acme", is_operator=False)
    assert both.caller(bearer(keys["ops"])) == both.caller(bearer(token(sub="ops"))) == Caller("ops", is_operator=True)
    only_keys = Clients(AuthConfig(keys_file=file))
    only_tokens = Clients(AuthConfig(jwt=jwt))
    assert detail(only_keys, token()) == "a kind of credential that this gateway does not take"
    assert detail(only_tokens, keys["acme"]) == "a kind of credential that this gateway does not take"
    assert only_tokens.caller(bearer(token())).tenant == "acme"


def test_a_key_counts_as_long_as_its_line_is_there(tmp_path: Path) -> None:
    file, keys = key_file(tmp_path, "acme", "globex")
    clients = Clients(AuthConfig(keys_file=file))
    assert clients.caller(bearer(keys["globex"])).tenant == "globex"
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")
    clients.refresh()
    assert detail(clients, keys["globex"]) == "an API key with an unknown id"
    assert clients.caller(bearer(keys["acme"])).tenant == "acme"
    # The same size and, within a tick of the clock, the same time.
    file.write_text(lines[1] + "\n")
    clients.refresh()
    assert clients.caller(bearer(keys["globex"])).tenant == "globex"


def test_a_providers_new_keys_count_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "pem"
    file.write_text(pem(RSA))
    clients = Clients(AuthConfig(jwt=JwtConfig(keys_file=file)))
    assert detail(clients, token(OTHER_RSA)) == "a token with a wrong signature"
    file.write_text(pem(OTHER_RSA))
    clients.refresh()
    assert clients.caller(bearer(token(OTHER_RSA))).tenant == "acme"
    assert detail(clients, token(RSA)) == "a token with a wrong signature"


def test_a_bug_in_reading_one_file_is_told_once_and_the_other_is_read_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, keys = key_file(tmp_path, "acme")
    (tmp_path / "pem").write_text(pem(RSA))

    def parse(text: str, where: str) -> ApiKeys:
        assert "odd" not in text, "a bug"
        return parse_keys(text, where)

    monkeypatch.setattr("cluster.security.clients.parse_keys", parse)
    clients = Clients(AuthConfig(keys_file=file, jwt=JwtConfig(keys_file=tmp_path / "pem")))
    file.write_text("odd")
    (tmp_path / "pem").write_text(pem(OTHER_RSA))
    for _ in range(3):
        clients.refresh()
    [record] = caplog.records
    assert record.getMessage() == f"{file}: reading it has crashed: AssertionError; what it said before still counts"
    assert record.exc_info is not None
    assert clients.caller(bearer(keys["acme"])).tenant == "acme"
    assert clients.caller(bearer(token(OTHER_RSA))).tenant == "acme"
    assert detail(clients, token(RSA)) == "a token with a wrong signature"


def test_a_file_that_cannot_be_used_changes_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, keys = key_file(tmp_path, "acme")
    clients = Clients(AuthConfig(keys_file=file))
    good = file.read_text()
    with caplog.at_level(logging.DEBUG):
        for content in (good + keys["acme"] + "\n", None):
            caplog.clear()
            file.unlink() if content is None else file.write_text(content)
            for _ in range(3):
                clients.refresh()
                assert clients.caller(bearer(keys["acme"])).tenant == "acme"
            (line,) = caplog.messages
            assert line.startswith(f"{file}")
            assert line.endswith("what it said before still counts")
            assert keys["acme"] not in line
        caplog.clear()
        file.write_text("")
        clients.refresh()
    assert detail(clients, keys["acme"]) == "an API key with an unknown id"
    assert caplog.messages == [f"{file} has changed and counts now"]


def test_a_gateway_does_not_start_on_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: cannot be read: No such file"):
        Clients(AuthConfig(keys_file=tmp_path / "none"))
    (tmp_path / "pem").write_text("nothing")
    with pytest.raises(ConfigError, match="pem: holds no key"):
        Clients(AuthConfig(jwt=JwtConfig(keys_file=tmp_path / "pem")))
