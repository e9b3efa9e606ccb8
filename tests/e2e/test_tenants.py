"""Tenants of a real service: who may call, what they share, and that nothing secret is written anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from tandem.client import Client, GenerateComplete

from tests.e2e.service import Served, error_of, serving, tandem
from tests.golden.default_model import require_default_model
from tests.security.credentials import RSA, key_file, pem, token

pytestmark = [pytest.mark.model]
PROMPT = "Our own words, which are nobody else's: " + "one two three four five six seven eight nine ten. " * 4
SALT = "a salt of our own"


@dataclass
class Tenants:
    """A service that tells its callers apart, and what they call it with."""

    served: Served
    folder: Path
    file: Path
    keys: dict[str, str]

    def key_file(self, tenant: str) -> str:
        path = self.folder / f"{tenant}.key"
        path.write_text(self.keys[tenant] + "\n")
        return str(path)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    require_default_model()
    folder = tmp_path_factory.mktemp("tenants")
    file, keys = key_file(folder, "acme", "globex", "initech", "ops", "leaver")
    (folder / "pem").write_text(pem(RSA))
    config = f"""
engine: {{kv_cache_bytes: 67108864}}
gateway:
  heartbeat_interval_s: 0.2
  router: {{policy: least_loaded}}
  auth: {{keys_file: {file}, jwt: {{keys_file: {folder}/pem}}, operators: [ops]}}
  tenants: {{initech: {{tokens_per_minute: 40}}}}
cluster: {{grpc_port: 0, drain_s: 2}}
"""
    variables = {"TANDEM_LOG_LEVEL": "debug"}
    with serving(folder, "--address", "none", config=config, variables=variables) as served:
        yield Tenants(served, folder, file, keys)


async def ask(tenants: Tenants, key: str, salt: str = "", prompt: str = PROMPT) -> GenerateComplete:
    async with Client(tenants.served.address, api_key=key, timeout_s=60) as client:
        return await client.complete(prompt, max_tokens=4, temperature=0, cache_salt=salt)


async def test_tenants_share_no_prefix_and_each_shares_its_own(tenants: Tenants) -> None:
    """The same prompt and the same salt; the prefill worker tells the gateway of its cache between two requests."""
    cached: dict[tuple[str, str, int], int] = {}
    callers = {"acme": tenants.keys["acme"], "globex": tenants.keys["globex"], "umbrella": token(sub="umbrella")}
    answers = set()
    for turn in range(2):
        for salt in (SALT, ""):
            for tenant, key in callers.items():
                answer = await ask(tenants, key, salt)
                cached[tenant, salt, turn] = answer.usage.cached_tokens
                answers.add(tuple(answer.choices[0].token_ids))
    assert len(answers) == 1
    first = {key: count for key, count in cached.items() if key[2] == 0}
    again = {key: count for key, count in cached.items() if key[2] == 1}
    assert set(first.values()) == {0}, first
    assert min(again.values()) >= 32, again
    # A token of a tenant and a key of the same are the same tenant's.
    assert (await ask(tenants, token(sub="acme"), SALT)).usage.cached_tokens >= 32


def test_the_command_line_calls_with_a_key(tenants: Tenants) -> None:
    url = ("--url", tenants.served.address)
    assert "expected metadata `authorization: Bearer`" in error_of(tandem("generate", "Hi", *url))
    assert "the cluster's status is for operators" in error_of(
        tandem("status", *url, "--api-key-file", tenants.key_file("acme"))
    )
    (answer,) = tenants.served.generate("Hi", "--max-tokens", "2", "--api-key-file", tenants.key_file("acme"))
    assert answer["usage"]["completion_tokens"] <= 2
    status = tandem("status", *url, "--api-key-file", tenants.key_file("ops"))
    assert status.returncode == 0
    assert "decode-0" in status.stdout
    bench = tandem(
        "bench", *url, "--rate", "5", "--requests", "3", "--output-tokens", "2", "--input-tokens", "8", "--json",
        "--warm-up", "0", "--api-key-file", tenants.key_file("acme"),
    )  # fmt: skip
    assert bench.returncode == 0, bench.stderr
    assert json.loads(bench.stdout)["ending"] == {"answered": 3}


async def test_a_tenant_over_its_quota_is_refused_and_counted(tenants: Tenants) -> None:
    key = tenants.keys["initech"]
    with pytest.raises(grpc.aio.AioRpcError, match="this tenant's tokens_per_minute") as caught:
        await ask(tenants, key)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (
        "no waiting would help: the prompt alone is too long"
    )
    prompt = "one two three four five six seven eight nine ten"
    await ask(tenants, key, prompt=prompt)
    await ask(tenants, key, prompt=prompt)
    with pytest.raises(grpc.aio.AioRpcError, match="over this tenant's tokens_per_minute; retry after") as caught:
        await ask(tenants, key, prompt=prompt)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with Client(tenants.served.address, api_key=tenants.keys["ops"]) as client:
        status = await client.status()
    assert status.requests_over_quota >= 1
    assert status.requests_rejected == 0


async def test_a_key_is_taken_away_without_a_restart(tenants: Tenants) -> None:
    await ask(tenants, tenants.keys["leaver"], prompt="Hi")
    lines = tenants.file.read_text().splitlines(keepends=True)
    tenants.file.write_text("".join(line for line in lines if " leaver " not in line))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            await ask(tenants, tenants.keys["leaver"], prompt="Hi")
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED  # noqa: PT017 - it counts for a second more
            break
    else:
        pytest.fail("a key whose line is gone still counts after ten seconds")
    await ask(tenants, tenants.keys["acme"], prompt="Hi")


async def test_nothing_secret_is_written_anywhere(tenants: Tenants) -> None:
    """Last: it looks at what all the others have left, at debug level, of gateway and workers."""
    credential, forged = token(sub="acme"), token(sub="acme")[:-20] + "A" * 20
    await ask(tenants, credential, SALT)
    for bad in (forged, tenants.keys["acme"][:-5] + "AAAAA"):
        with pytest.raises(grpc.aio.AioRpcError, match="the key or token is not valid"):
            await ask(tenants, bad, SALT)
    said = tenants.served.log.read_text()
    assert "ipv4:127.0.0.1: refused a call: a wrong API key" in said
    assert "DEBUG" in said
    secrets = [*tenants.keys.values(), credential, forged, SALT, "Our own words", "one two three"]
    secrets += [key.split("_", 2)[2] for key in tenants.keys.values()]
    commands = "\n".join(tenants.served.descendants().values())
    files = [path for path in tenants.folder.rglob("*") if path.is_file() and path.suffix != ".key"]
    written = "\n".join([said, commands, *(path.read_text(errors="replace") for path in files)])
    assert [secret for secret in secrets if secret in written] == []
