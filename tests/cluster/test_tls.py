"""Certificates between gateway and workers: who shows none, or a wrong one, is refused, and the rest never notices."""

from __future__ import annotations

import logging
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc.aio
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cluster.cli import run_command
from cluster.config import load
from cluster.registry import HeartbeatReply, WorkerReport
from cluster.registry_server import registry_service, send_heartbeat
from cluster.security.certs import Signer, make_ca, make_certs, make_leaf, own_ca
from cluster.security.names import GATEWAY_NAME, WORKER_NAME
from cluster.security.security_config import SecurityConfig
from engine.errors import ConfigError, PermissionDenied, Unavailable
from engine.stats import LoopStats
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import RpcServer, start_server
from kvtransfer.rpc_tls import Tls

REPORT = WorkerReport("w", "prefill", "a:1", 1, "model", LoopStats(0, 0, 0, 8, 8, 0, 16, 0))


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    make_certs(tmp_path / "certs", ["localhost", "127.0.0.1"], days=1)
    return tmp_path / "certs"


def write(folder: Path, signer: Signer, cert: bytes, key: bytes) -> Path:
    folder.mkdir()
    (folder / "ca.crt").write_bytes(signer.cert.public_bytes(Encoding.PEM))
    (folder / "tls.crt").write_bytes(cert)
    (folder / "tls.key").write_bytes(key)
    return folder


@asynccontextmanager
async def gateway(certs: Path, reports: list[WorkerReport]) -> AsyncIterator[RpcServer]:
    def take(report: WorkerReport) -> HeartbeatReply:
        reports.append(report)
        return HeartbeatReply(1.0)

    services = [replace(registry_service(take), caller=WORKER_NAME)]
    server = await start_server("127.0.0.1:0", services, tls=Tls(certs / "gateway"))
    try:
        yield server
    finally:
        await server.stop()


async def beat(server: RpcServer, folder: Path | None, peer: str = GATEWAY_NAME) -> HeartbeatReply:
    channels = Channels(tls=None if folder is None else Tls(folder), peer=peer)
    try:
        return await send_heartbeat(channels, server.address, REPORT, timeout_s=5)
    finally:
        await channels.close()


async def test_a_worker_with_its_certificate_is_heard(certs: Path):
    reports: list[WorkerReport] = []
    async with gateway(certs, reports) as server:
        assert await beat(server, certs / "worker") == HeartbeatReply(1.0)
        assert reports == [REPORT]


async def test_no_certificate_is_refused(certs: Path):
    reports: list[WorkerReport] = []
    async with gateway(certs, reports) as server:
        with pytest.raises(Unavailable):
            await beat(server, None, peer="")
        # Encrypted, but without a certificate of its own.
        credentials = grpc.ssl_channel_credentials((certs / "worker" / "ca.crt").read_bytes())
        options = [("grpc.ssl_target_name_override", GATEWAY_NAME)]
        async with grpc.aio.secure_channel(server.address, credentials, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/tandem.v1.Registry/Heartbeat")(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await beat(server, certs / "worker") == HeartbeatReply(1.0)
        assert reports == [REPORT]


@pytest.mark.parametrize("age", ["another CA", "expired", "not yet valid"])
async def test_a_certificate_that_is_not_good_is_refused(certs: Path, tmp_path: Path, age: str):
    reports: list[WorkerReport] = []
    right = own_ca(certs / "ca")
    signer = make_ca() if age == "another CA" else right
    now = datetime.now(UTC) + {"expired": -timedelta(days=9), "not yet valid": timedelta(days=9)}.get(age, timedelta())
    folder = write(tmp_path / "bad", right, *make_leaf(signer, [WORKER_NAME], timedelta(days=1), now))
    async with gateway(certs, reports) as server:
        with pytest.raises(Unavailable):
            await beat(server, folder)
        assert await beat(server, certs / "worker") == HeartbeatReply(1.0)
        assert reports == [REPORT]


async def test_a_certificate_of_another_role_is_refused_and_logged(certs: Path, caplog):
    reports: list[WorkerReport] = []
    async with gateway(certs, reports) as server:
        with pytest.raises(PermissionDenied, match=f"for callers with a certificate for {WORKER_NAME}"):
            await beat(server, certs / "clients")
        assert sum("not for localhost" in record.message for record in caplog.records) == 1
        assert not reports


async def test_a_server_of_another_ca_or_role_is_not_spoken_to(certs: Path, tmp_path: Path):
    reports: list[WorkerReport] = []
    make_certs(tmp_path / "other", ["localhost"], days=1)
    async with gateway(tmp_path / "other", reports) as server:
        with pytest.raises(Unavailable):
            await beat(server, certs / "worker")
    async with gateway(certs, reports) as server:
        with pytest.raises(Unavailable):
            await beat(server, certs / "worker", peer=WORKER_NAME)
    assert not reports


async def test_new_certificates_are_taken_while_calls_go_on(certs: Path, tmp_path: Path):
    """A whole new CA: the first calls with it are made by new connections, those under way stay."""
    reports: list[WorkerReport] = []
    async with gateway(certs, reports) as server:
        channels = Channels(tls=Tls(certs / "worker"), peer=GATEWAY_NAME)
        with channels.use(server.address) as before:
            await send_heartbeat(channels, server.address, REPORT)
            shutil.rmtree(certs / "ca")
            make_certs(certs, ["localhost"], days=1)
            await send_heartbeat(channels, server.address, REPORT)
            assert channels.get(server.address) is not before
            # The connection from before still carries calls.
            await before.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)
        await channels.close()
    assert len(reports) == 2


async def test_files_that_do_not_fit_each_other_are_passed_over(certs: Path, caplog):
    caplog.set_level(logging.INFO)
    tls = Tls(certs / "worker")
    before = tls.files()
    make_certs(certs.parent / "other", ["localhost"], days=1)
    shutil.copy(certs.parent / "other" / "worker" / "tls.crt", certs / "worker" / "tls.crt")
    assert tls.files() is before
    assert tls.files() is before
    assert sum("stay in force" in record.message for record in caplog.records) == 1
    (certs / "worker" / "tls.key").unlink()
    assert tls.files() is before
    shutil.copy(certs.parent / "other" / "worker" / "tls.key", certs / "worker" / "tls.key")
    assert tls.files().key == (certs.parent / "other" / "worker" / "tls.key").read_bytes()


def test_files_that_go_while_they_are_read_are_passed_over(certs: Path, monkeypatch: pytest.MonkeyPatch):
    tls = Tls(certs / "worker")
    before, key = tls.files(), certs / "worker" / "tls.key"
    # The last that is looked at.
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda _, cadata: key.unlink())
    key.touch()
    assert tls.files() is before
    assert not key.exists()


def test_certificates_that_cannot_be_used_are_a_configuration_error(certs: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"ca\.crt: No such file or directory; expected ca\.crt, tls\.crt, tls\.key"):
        Tls(tmp_path / "nowhere")
    (certs / "worker" / "tls.key").write_text("no key")
    with pytest.raises(ConfigError, match="no certificate and its key"):
        Tls(certs / "worker")
    (certs / "gateway" / "ca.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca\.crt: no certificates"):
        Tls(certs / "gateway")


def test_keys_are_for_their_owner_alone_and_the_ca_is_kept(certs: Path):
    assert {path.stat().st_mode & 0o777 for path in certs.rglob("*.key")} == {0o600}
    before = (certs / "ca" / "ca.crt").read_bytes()
    make_certs(certs, ["localhost"], days=1)
    assert (certs / "ca" / "ca.crt").read_bytes() == before
    ssl.create_default_context(cadata=before.decode())


def test_the_command_prints_what_the_configuration_takes(tmp_path: Path, capsys):
    assert run_command(["certs", str(tmp_path / "certs"), "--host", "inference.example.org", "--days", "30"]) == 0
    (tmp_path / "tandem.yaml").write_text(capsys.readouterr().out)
    security = load(tmp_path / "tandem.yaml").security
    for folder in (security.gateway_certs, security.worker_certs, security.client_certs):
        assert folder is not None
        Tls(folder)
    assert run_command(["certs", str(tmp_path / "certs"), "--host", "not a name\u00e9"]) == 2
    assert "--host: got" in capsys.readouterr().err


def test_one_end_alone_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="worker_certs: got null, expected a folder where gateway_certs is given"):
        SecurityConfig(gateway_certs=tmp_path)
    with pytest.raises(ValueError, match="gateway_certs: got null"):
        SecurityConfig(worker_certs=tmp_path)
