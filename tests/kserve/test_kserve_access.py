"""KServe's service behind the same door as the rest: keys, tenants, quotas."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
from tandem.kserve import open_inference_pb2 as pb

from cluster.security.auth_config import AuthConfig, QuotaConfig
from cluster.security.clients import Clients
from engine.errors import Overloaded, Unauthenticated
from kvtransfer.rpc import error_from_rpc
from tests.cluster.serving import CONFIG
from tests.kserve.service import Service, request, serving, values
from tests.security.credentials import key_file

OPEN = {"ServerLive", "ServerReady"}
MESSAGES = {
    "ServerLive": pb.ServerLiveRequest(),
    "ServerReady": pb.ServerReadyRequest(),
    "ModelReady": pb.ModelReadyRequest(name="tiny"),
    "ServerMetadata": pb.ServerMetadataRequest(),
    "ModelMetadata": pb.ModelMetadataRequest(name="tiny"),
    "ModelInfer": request(),
    "ModelStreamInfer": request(),
}


async def is_refused(service: Service, method: str, metadata: list[tuple[str, str]]) -> bool:
    message = MESSAGES[method]
    is_stream = method == "ModelStreamInfer"
    call = getattr(service.stub, method)(iter([message]) if is_stream else message, metadata=metadata, timeout=20)
    try:
        answer = await (call.read() if is_stream else call)
    except grpc.aio.AioRpcError as error:
        return type(error_from_rpc(error)) is Unauthenticated
    assert answer is not grpc.aio.EOF, "nothing was answered"
    return False


async def test_all_but_health_ask_who_calls(tmp_path: Path) -> None:
    file, keys = key_file(tmp_path, "acme")
    clients = Clients(AuthConfig(keys_file=file))
    async with serving(clients=clients) as service:
        assert MESSAGES.keys() == service_methods()
        for method in MESSAGES:
            for metadata in ([], [("authorization", "Bearer " + keys["acme"][:-4] + "AAAA")]):
                assert await is_refused(service, method, metadata) is (method not in OPEN), method
        assert service.fake.submits == []
        for method in MESSAGES:
            assert not await is_refused(service, method, [("authorization", f"Bearer {keys['acme']}")]), method
        answer = await service.stub.ModelInfer(request(), metadata=[("x-api-key", keys["acme"])], timeout=20)
        assert values(answer, "text_output") == ["One, two, three."]


def service_methods() -> set[str]:
    return {method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}


async def test_quotas_are_a_tenants_whichever_way_it_calls(tmp_path: Path) -> None:
    file, keys = key_file(tmp_path, "acme", "globex")
    config = CONFIG.model_copy(update={"tenants": {"acme": QuotaConfig(tokens_per_minute=30)}})
    async with serving(config=config, clients=Clients(AuthConfig(keys_file=file))) as service:
        metadata = [("x-api-key", keys["acme"])]
        await service.stub.ModelInfer(request(), metadata=metadata, timeout=20)
        code, error = await service.refusal(request(), metadata=metadata)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error, Overloaded)
        assert error.reason == "over this tenant's tokens_per_minute"
        assert await service.stub.ModelInfer(request(), metadata=[("x-api-key", keys["globex"])], timeout=20)
