"""What carries a trace between processes, also between releases."""

from __future__ import annotations

from tandem.v1 import worker_pb2

from decode_worker.convert import command_from_bytes, command_to_bytes
from decode_worker.stream import Submit
from engine.trace_context import read_trace
from kvtransfer.frames import End
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.rpc_server import start_server
from kvtransfer.transport import PrefillCall
from prefill_worker.server import prefill_service
from tests.emulated import call, submit

TRACE = read_trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "a=1")


def test_the_token_stream_carries_it_per_request() -> None:
    for trace in (TRACE, None):
        sent = submit(3, trace=trace)
        assert command_from_bytes(command_to_bytes(sent)) == sent


def test_a_gateway_that_knows_nothing_of_traces_or_says_nonsense_has_requests_without_one() -> None:
    raw = worker_pb2.Command.FromString(command_to_bytes(submit(3, trace=TRACE)))
    for traceparent in ("", "nonsense"):
        raw.submit.traceparent = traceparent
        read = command_from_bytes(raw.SerializeToString())
        assert isinstance(read, Submit)
        assert read.trace is None


class Listening:
    """A PrefillService that notes what it is called with, and sends nothing."""

    def __init__(self) -> None:
        self.calls: list[PrefillCall] = []

    async def prefill(self, asked: PrefillCall):
        self.calls.append(asked)
        yield End(0, 0)


async def test_the_prefill_call_carries_it_in_its_metadata() -> None:
    service, transport = Listening(), GrpcPrefillTransport()
    server = await start_server("127.0.0.1:0", [prefill_service(service)])
    try:
        for trace in (TRACE, None):
            async with transport.open(server.address, call(3, trace=trace)) as frames:
                assert [frame async for frame in frames] == [End(0, 0)]
    finally:
        await transport.close()
        await server.stop()
    assert [each.trace for each in service.calls] == [TRACE, None]
