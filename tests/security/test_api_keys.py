"""API keys: made once, known by their hashes alone, and compared without telling anything."""

from __future__ import annotations

import re
import stat
import threading
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.security.api_keys import NOBODY, ApiKeys, HashedKey, new_key, parse_keys
from engine.errors import ConfigError, Unauthenticated
from tests.security.credentials import key_file


def test_a_new_key_counts_and_the_file_does_not_hold_it(tmp_path: Path) -> None:
    file, made = key_file(tmp_path, "acme", "globex")
    text = file.read_text()
    keys = parse_keys(text, "keys")
    assert {tenant: keys.tenant_of(key) for tenant, key in made.items()} == {"acme": "acme", "globex": "globex"}
    for key in made.values():
        secret = key.split("_", 2)[2]
        assert len(secret) == 43
        assert secret not in text
        assert secret not in repr(keys) + repr(vars(keys))
        assert sha256(key.encode()).hexdigest() in text


def test_the_file_is_made_for_its_owner_alone_and_only_added_to(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    new_key("acme", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # Somebody's editor left no end of line.
    file.write_text("# ours\n" + file.read_text().rstrip("\n"))
    key = new_key("globex", file)
    assert len(file.read_text().splitlines()) == 3
    assert parse_keys(file.read_text(), "keys").tenant_of(key) == "globex"


def test_keys_made_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(new_key("acme", tmp_path / "keys"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = parse_keys((tmp_path / "keys").read_text(), "keys")
    assert {keys.tenant_of(key) for key in made} == {"acme"}


@pytest.mark.parametrize("tenant", ["", "a b", "a#b", "a\nb", "x" * 129, "\u00a0"])
def test_a_tenants_name_is_one_word(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(ConfigError, match=r"^--tenant: got .* expected a word"):
        new_key(tenant, tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def changed(key: str, index: int) -> str:
    return key[:index] + ("A" if key[index] != "A" else "B") + key[index + 1 :]


def test_a_key_that_differs_in_any_place_does_not_count(tmp_path: Path) -> None:
    file, made = key_file(tmp_path, "acme")
    keys, key = parse_keys(file.read_text(), "keys"), made["acme"]
    for index in range(len(key)):
        with pytest.raises(Unauthenticated, match=r"^the key or token is not valid$"):
            keys.tenant_of(changed(key, index))
    for other in (key + "A", key[:-1], "", key + "\n", " " + key, key.upper()):
        with pytest.raises(Unauthenticated, match=r"^the key or token is not valid$"):
            keys.tenant_of(other)


def test_one_tenants_secret_under_anothers_id_does_not_count(tmp_path: Path) -> None:
    file, made = key_file(tmp_path, "acme", "globex")
    (_, acme_id, _), (_, _, globex_secret) = (made[tenant].split("_", 2) for tenant in ("acme", "globex"))
    with pytest.raises(Unauthenticated) as caught:
        parse_keys(file.read_text(), "keys").tenant_of(f"tandem_{acme_id}_{globex_secret}")
    assert caught.value.detail == "a wrong API key"


class Watched(bytes):
    """A digest that may only be compared as a whole, in constant time."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared by ==, which stops at the first difference")

    __hash__ = bytes.__hash__


def test_digests_are_compared_in_constant_time(tmp_path: Path) -> None:
    _, made = key_file(tmp_path, "acme")
    key = made["acme"]
    keys = ApiKeys({key[7:19]: HashedKey("acme", Watched(sha256(key.encode()).digest()))})
    assert keys.tenant_of(key) == "acme"
    with pytest.raises(Unauthenticated):
        keys.tenant_of(key[:-4] + "AAAA")


def test_the_key_of_nobody_is_nobodys() -> None:
    # Were a key found whose digest is all zeros, it would still not count.
    assert HashedKey("", bytes(32)) == NOBODY
    with pytest.raises(Unauthenticated):
        parse_keys("", "keys").tenant_of("tandem_" + "0" * 12 + "_" + "A" * 43)


GOOD = f"0123456789ab acme {'0' * 64}"


def test_comments_and_empty_lines_are_passed_over() -> None:
    parse_keys(f"\n# all of them\n  {GOOD}  # since May\r\n\n", "keys")


@pytest.mark.parametrize(
    "line",
    [
        "tandem_0123456789ab_" + "s" * 43,
        f"{GOOD} more",
        "0123456789ab acme",
        GOOD[1:],
        GOOD[:-1],
        f"0123456789ab acme {'G' * 64}",
    ],
)
def test_a_line_that_is_none_is_named_by_its_number_and_not_shown(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(f"{GOOD}\n{line}\n", "/etc/keys")
    assert str(caught.value) == "/etc/keys:2: expected a line as `tandem keys new` writes it: ID TENANT SHA256"


def test_an_id_is_there_once() -> None:
    with pytest.raises(ConfigError, match=re.escape("keys:2: the id 0123456789ab is there twice")):
        parse_keys(f"{GOOD}\n{GOOD}", "keys")


@given(st.text())
def test_any_text_is_a_file_of_keys_or_an_error_with_a_line(text: str) -> None:
    try:
        parse_keys(text, "keys")
    except ConfigError as error:
        assert re.match(r"keys:\d+: ", str(error))  # noqa: PT017 - what it says is the point


@given(st.text())
def test_any_text_is_no_key(text: str) -> None:
    with pytest.raises(Unauthenticated):
        parse_keys(GOOD, "keys").tenant_of(text)
