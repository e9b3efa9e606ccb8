"""A whole service with certificates everywhere: real processes, real model, and callers that must not get in."""

from __future__ import annotations

import asyncio
import shlex
import shutil
from pathlib import Path

import grpc
import pytest
from tandem.client import Client
from tandem.v1 import prefill_pb2

from cluster.security.certs import make_certs
from cluster.security.names import WORKER_NAME
from tests.e2e.service import CONFIG, Served, error_of, kill, serving, tandem
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model]
PROMPT, ANSWER = "The capital of France is", " Paris"
PREFILL = "/tandem.v1.PrefillWorker/Prefill"


@pytest.fixture(scope="module")
def certs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_certs(folder, ["localhost", "127.0.0.1"], days=1)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory, certs: Path):
    require_default_model()
    folders = f"gateway_certs: {certs}/gateway, worker_certs: {certs}/worker, client_certs: {certs}/clients"
    security = f"security: {{{folders}}}\n"
    with serving(tmp_path_factory.mktemp("secured"), "--address", "none", config=CONFIG + security) as served:
        yield served


async def ask(served: Served, certs: Path) -> str:
    async with Client(served.address, ca=(certs / "clients" / "ca.crt").read_bytes(), timeout_s=60) as client:
        return (await client.complete(PROMPT, temperature=0, max_tokens=4)).choices[0].text


async def workers(served: Served, certs: Path) -> dict[str, tuple[str, int]]:
    """Address and incarnation by id, of those that report."""
    async with Client(served.address, ca=(certs / "clients" / "ca.crt").read_bytes(), timeout_s=60) as client:
        found = (await client.status()).workers
    return {worker.worker_id: (worker.address, worker.incarnation) for worker in found if worker.fresh}


async def test_clients_are_served_over_tls_and_in_no_other_way(served: Served, certs: Path):
    assert (await ask(served, certs)).startswith(ANSWER)
    async with Client(served.address, timeout_s=5) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.complete(PROMPT)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_command_line_calls_over_tls(served: Served, certs: Path):
    words = shlex.split(served.log.read_text().partition("try:  tandem ")[2].splitlines()[0])
    assert words[words.index("--ca") + 1] == str(certs / "clients" / "ca.crt")
    done = tandem(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout
    error_of(tandem("status", "--url", served.address))
    assert "expected certificates" in error_of(tandem("status", "--ca", str(certs / "clients" / "tls.key")))


async def test_the_kv_port_is_closed_to_whoever_has_no_certificate(served: Served, certs: Path):
    address, _ = (await workers(served, certs))["prefill-0"]
    request = prefill_pb2.PrefillRequest(request_id="x", token_ids=[1, 2, 3]).SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_stream(PREFILL)(request, timeout=5).read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await ask(served, certs)).startswith(ANSWER)


@pytest.mark.parametrize(
    ("role", "problem"),
    [("worker", "a ticket of the gateway is needed"), ("gateway", "for callers with a certificate for worker")],
)
async def test_a_certificate_alone_gets_no_kv(served: Served, certs: Path, role: str, problem: str):
    """A worker's certificate opens the port, and no stream: that takes the gateway's ticket."""
    address, _ = (await workers(served, certs))["prefill-0"]
    files = (certs / role / name for name in ("ca.crt", "tls.key", "tls.crt"))
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    request = prefill_pb2.PrefillRequest(request_id="x", token_ids=[1, 2, 3]).SerializeToString()
    options = [("grpc.ssl_target_name_override", WORKER_NAME)]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_stream(PREFILL)(request, timeout=5).read()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert problem in (caught.value.details() or "")
    assert (await ask(served, certs)).startswith(ANSWER)


async def test_new_certificates_are_taken_without_a_restart(served: Served, certs: Path):
    """A new CA, so that nothing of the old one is of use: a worker that is started anew joins with the new one."""
    before = (await workers(served, certs))["decode-0"][1]
    shutil.rmtree(certs / "ca")
    make_certs(certs, ["localhost", "127.0.0.1"], days=1)
    assert (await ask(served, certs)).startswith(ANSWER)
    kill([pid for pid, command in served.descendants().items() if "--id decode-0" in command])
    async with asyncio.timeout(60):
        while (await workers(served, certs)).get("decode-0", ("", 0))[1] <= before:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.2)
    assert (await ask(served, certs)).startswith(ANSWER)
