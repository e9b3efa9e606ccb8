"""A collector for tests: takes OTLP over gRPC, as any other does, and keeps what came."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """`spans` are what came, each with its process's attributes. While `goes_on` is clear, nothing is answered."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[tuple[dict[str, str], Span]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.has_call = threading.Event()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.has_call.set()
        self.goes_on.wait()
        for each in request.resource_spans:
            process = texts(each.resource.attributes)
            self.spans += [(process, span) for scope in each.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def texts(attributes: list[KeyValue]) -> dict[str, str]:
    """Those that are texts."""
    return {each.key: each.value.string_value for each in attributes if each.value.HasField("string_value")}


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A collector on a port of its own."""
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.goes_on.set()
        server.stop(0).wait()
