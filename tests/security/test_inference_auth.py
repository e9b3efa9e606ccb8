"""Attacks on a gateway that asks who calls, over real gRPC: the right status, one line in the log, nobody else hurt."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tandem.client import Client, GenerateComplete
from tandem.v1 import inference_pb2 as pb

from cluster.gateway import Gateway
from cluster.inference_server import inference_service
from cluster.security.auth_config import AuthConfig, JwtConfig, QuotaConfig
from cluster.security.clients import Clients
from cluster.security.tenant_salts import TenantSalts
from engine.errors import InvalidArgument, Overloaded, PermissionDenied, TandemError, Unauthenticated
from kvtransfer.rpc import error_from_rpc
from kvtransfer.rpc_server import start_server
from tests.cluster.fake_decode import FakeDecode
from tests.cluster.serving import ANSWER, CONFIG, LENGTH, TOKENIZER
from tests.cluster.serving import serving as serving_gateway
from tests.eventually import eventually
from tests.security.credentials import OTHER_RSA, RSA, key_file, pem, token
from tests.security.test_jwt_tokens import CLAIMS, unsigned

METHODS = {
    "Generate": pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(max_tokens=1)),
    "GetModel": pb.GetModelRequest(),
    "Tokenize": pb.TokenizeRequest(text="hello"),
    "Detokenize": pb.DetokenizeRequest(token_ids=[1]),
    "GetStatus": pb.GetStatusRequest(),
}
JWT_CLAIMS: dict[str, Any] = {"aud": "tandem", "iss": "https://login.example"}


@dataclass
class Guarded:
    """A served gateway, its clients, and the keys that they have."""

    address: str
    gateway: Gateway
    clients: Clients
    file: Path
    keys: dict[str, str]
    channel: grpc.aio.Channel

    def client(self, credential: str) -> Client:
        return Client(self.address, api_key=credential, timeout_s=20)

    async def answer(self, credential: str, **options: Any) -> GenerateComplete:
        async with self.client(credential) as client:
            return await client.complete(options.pop("prompt", "hello"), **{"max_tokens": LENGTH, **options})

    async def call(self, method: str, metadata: list[tuple[str, str]], request: Any = None) -> TandemError | None:
        """What a call ends with, made as a foreign client makes it."""
        message = request if request is not None else METHODS[method].SerializeToString()
        call = self.channel.unary_stream(f"/tandem.v1.Inference/{method}")(message, metadata=metadata, timeout=20)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error)
        return None


@asynccontextmanager
async def guarded(
    folder: Path, tenants: dict[str, QuotaConfig] | None = None, answer: list[int] = ANSWER
) -> AsyncIterator[Guarded]:
    file, keys = key_file(folder, "acme", "globex", "ops")
    (folder / "pem").write_text(pem(RSA))
    jwt = JwtConfig(keys_file=folder / "pem", audience="tandem", issuer="https://login.example")
    auth = AuthConfig(keys_file=file, jwt=jwt, operators=("ops",))
    config = CONFIG.model_copy(update={"auth": auth, "tenants": tenants or {}, "max_running": 8, "max_waiting": 8})
    clients = Clients(auth)
    async with serving_gateway(FakeDecode(answer), config=config, salts=TenantSalts(bytes(32))) as gateway:
        server = await start_server("127.0.0.1:0", [inference_service(gateway, clients)])
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            yield Guarded(server.address, gateway, clients, file, keys, channel)
        await server.stop()


def bearer(credential: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {credential}")]


def bad_credentials(good: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Attacks by what the log is to say of them."""
    acme = good["acme"]
    return {
        "no credential": [],
        "another scheme than Bearer": [("authorization", "Basic YWNtZTpwYXNz")],
        "several credentials at once": [*bearer(acme), ("x-api-key", acme)],
        "a wrong API key": bearer(acme[:-4] + "AAAA"),
        "an API key with an unknown id": bearer("tandem_" + "0" * 12 + acme[19:]),
        "a malformed API key": bearer(acme[:-1]),
        "an expired token": bearer(token(exp=time.time() - 99, **JWT_CLAIMS)),
        "a token for another audience": bearer(token(**{**JWT_CLAIMS, "aud": "billing"})),
        "a token of another issuer": bearer(token(**{**JWT_CLAIMS, "iss": "https://evil.example"})),
        "a token with a wrong signature": bearer(unsigned({"alg": "none"}, {**CLAIMS, **JWT_CLAIMS})),
    }


# ── who nobody knows ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_whoever_is_not_known_is_refused_for_every_method_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(tmp_path) as service:
        attacks = bad_credentials(service.keys)
        running = asyncio.create_task(service.answer(service.keys["globex"]))
        for metadata in attacks.values():
            for method in METHODS:
                for _ in range(3):
                    error = await service.call(method, metadata)
                    assert type(error) is Unauthenticated, (metadata, method)
                    assert str(error) in (
                        "the key or token is not valid",
                        "the token has expired",
                        "expected metadata `authorization: Bearer` with an API key or a token",
                    )
        assert (await running).choices[0].text == "One, two, three."
    lines = [record.getMessage() for record in caplog.records if record.name == "cluster.door"]
    assert lines == [f"ipv4:127.0.0.1: refused a call: {problem}" for problem in attacks]


async def test_a_token_signed_with_the_public_key_as_a_secret_is_refused(tmp_path: Path) -> None:
    import base64
    import hashlib
    import hmac

    async with guarded(tmp_path) as service:
        body = unsigned({"alg": "HS256", "typ": "JWT"}, {**CLAIMS, **JWT_CLAIMS}).rpartition(".")[0]
        signature = hmac.new(pem(RSA).encode(), body.encode(), hashlib.sha256).digest()
        forged = f"{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
        for credential in (forged, token(OTHER_RSA, **JWT_CLAIMS)):
            assert isinstance(await service.call("Generate", bearer(credential)), Unauthenticated)
        assert await service.call("Generate", bearer(token(**JWT_CLAIMS))) is None


@pytest.mark.parametrize("kib", [7, 12, 200, 3000])
async def test_a_huge_token_is_refused_and_the_service_goes_on(tmp_path: Path, kib: int) -> None:
    async with guarded(tmp_path) as service:
        huge = token(padding="x" * (kib << 10), **JWT_CLAIMS)
        error = await service.call("Generate", bearer(huge))
        # gRPC itself refuses metadata of more than 8 KiB sometimes, and of more than 16 always.
        assert isinstance(error, Unauthenticated | InvalidArgument)
        assert await service.call("Generate", bearer(service.keys["acme"])) is None


async def test_the_request_of_a_caller_whom_nobody_knows_is_not_taken_in(tmp_path: Path) -> None:
    """Its bytes stay with the sender, but for what flow control lets through."""
    async with guarded(tmp_path) as service:
        huge = b"\xff" * (60 << 20)
        # Were it read, it would be refused as no message of this method, or by its size.
        for request in (huge, huge + huge):
            assert isinstance(await service.call("Generate", [], request), Unauthenticated)
        assert isinstance(await service.call("Generate", bearer(service.keys["acme"]), huge), InvalidArgument)


async def test_a_flood_of_bad_keys_is_one_line_and_slows_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(tmp_path) as service:
        wrong = bearer(service.keys["acme"][:-4] + "AAAA")
        flood = [asyncio.create_task(service.call("Generate", wrong)) for _ in range(300)]
        assert (await service.answer(service.keys["globex"])).usage.completion_tokens == LENGTH
        assert all(isinstance(error, Unauthenticated) for error in await asyncio.gather(*flood))
    lines = [record for record in caplog.records if record.name == "cluster.door"]
    assert len(lines) == 1


# ── who is known ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_keys_and_tokens_open_every_method(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with guarded(tmp_path) as service:
        for credential in (service.keys["acme"], token(**JWT_CLAIMS), token(**{**JWT_CLAIMS, "aud": ["x", "tandem"]})):
            assert (await service.answer(credential)).choices[0].text == "One, two, three."
            async with service.client(credential) as client:
                assert (await client.get_model()).model == "tiny"
                assert await client.detokenize(await client.tokenize("hello")) == "hello"
        for name in ("authorization", "x-api-key"):
            value = f"Bearer {service.keys['acme']}" if name == "authorization" else service.keys["acme"]
            assert await service.call("Generate", [(name, value)]) is None
    assert not caplog.records


async def test_the_clusters_status_is_for_operators(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        error = await service.call("GetStatus", bearer(service.keys["acme"]))
        assert isinstance(error, PermissionDenied)
        assert str(error) == "the cluster's status is for operators (gateway.auth.operators)"
        for credential in (service.keys["ops"], token(**{**JWT_CLAIMS, "sub": "ops"})):
            async with service.client(credential) as client:
                assert len((await client.status()).workers) == 2


async def test_health_and_reflection_ask_nobody(tmp_path: Path) -> None:
    """Load balancers have no keys; the names of methods are no secret."""
    async with guarded(tmp_path) as service:
        check = service.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        reflect = service.channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [answer async for answer in reflect(iter([question]))]
        assert "tandem.v1.Inference" in {found.name for found in answer.list_services_response.service}


async def test_a_key_that_is_taken_away_counts_no_more_and_the_others_do(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        running = asyncio.create_task(service.answer(service.keys["acme"]))
        await eventually(lambda: service.gateway.status(0.0).requests_running)
        lines = service.file.read_text().splitlines()
        service.file.write_text("\n".join(line for line in lines if " acme " not in line))
        service.clients.refresh()
        assert isinstance(await service.call("Generate", bearer(service.keys["acme"])), Unauthenticated)
        assert await service.call("Generate", bearer(service.keys["globex"])) is None
        assert (await running).usage.completion_tokens == LENGTH, "what was let in goes on to its end"


# ── who asks for too much ────────────────────────────────────────────────────────────────────────────────────────────


async def test_calls_above_the_rate_are_told_when_to_come_back_and_others_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(tmp_path, {"acme": QuotaConfig(requests_per_s=0.5, burst=2)}) as service:
        key = bearer(service.keys["acme"])
        assert await service.call("GetModel", key) is None
        assert await service.call("Generate", key) is None
        # However large, a request above the rate is not taken in.
        error = await service.call("Generate", key, b"\xff" * (60 << 20))
        assert isinstance(error, Overloaded)
        assert error.reason == "over this tenant's requests_per_s"
        assert 0 < error.retry_after_s <= 2.0
        for method in ("Generate", "GetModel", "Tokenize", "Detokenize"):
            assert await service.call(method, bearer(service.keys["globex"])) is None
        await asyncio.sleep(error.retry_after_s)
        assert await service.call("Generate", key) is None
        assert service.gateway.status(0.0).requests_over_quota == 1
    assert not caplog.records


async def test_tokens_above_the_quota_are_told_when_to_come_back_and_others_are_served(tmp_path: Path) -> None:
    prompt_tokens = len(TOKENIZER.encode("hello"))
    size = prompt_tokens + LENGTH
    async with guarded(tmp_path, {"acme": QuotaConfig(tokens_per_minute=size)}) as service:
        await service.answer(service.keys["acme"])
        error = await service.call("Generate", bearer(service.keys["acme"]))
        assert isinstance(error, Overloaded)
        assert error.reason == "over this tenant's tokens_per_minute"
        # One token and the prompt, of which some part has come back by now.
        assert 0 < error.retry_after_s <= 60 * (prompt_tokens + 1) / size
        assert await service.call("Generate", bearer(service.keys["globex"])) is None
        assert isinstance(await service.call("Generate", bearer(token(**JWT_CLAIMS))), Overloaded), "the same tenant"


# ── what is said of it ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_secret_is_logged_or_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answers: list[str] = []
    async with guarded(tmp_path, {"acme": QuotaConfig(tokens_per_minute=30)}) as service:
        good = [*service.keys.values(), token(**JWT_CLAIMS)]
        secrets = [word for credential in good for word in (credential, credential[-30:])]
        for metadata in bad_credentials(service.keys).values():
            answers.append(str(await service.call("Generate", metadata)))
            secrets += [value.rpartition(" ")[2] for _, value in metadata]
        requests = [
            pb.GenerateRequest(
                text="the prompt nobody may see",
                cache_salt="the salt nobody may see",
                sampling_params=pb.SamplingParams(max_tokens=max_tokens),
            )
            for max_tokens in (3, 3, 9999)
        ]
        for request in requests:
            for credential in good:
                answers.append(str(await service.call("Generate", bearer(credential), request.SerializeToString())))
        # A key written into the file in clear, by mistake.
        service.file.write_text(service.file.read_text() + service.keys["acme"] + "\n")
        service.clients.refresh()
        answers += [repr(service.gateway.status(0.0)), repr(CONFIG), repr(service.clients), repr(service.keys.keys())]
    said = "\n".join([*answers, caplog.text])
    assert "refused a call" in said
    assert "over this tenant's tokens_per_minute" in said
    assert "expected a line as `tandem keys new` writes it" in said
    secrets.append("nobody may see")
    assert [secret for secret in secrets if secret in said] == []
