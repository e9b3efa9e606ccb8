"""Of grpcurl as much as the pages use, for machines without it: what can be called is learnt by server reflection, so
nothing here knows our protocols.

    grpcurl.py [-plaintext] [-d JSON] [-H 'name: value'] host:port list | service/method
"""

from __future__ import annotations

import argparse

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def call(channel: grpc.Channel, database: ProtoReflectionDescriptorDatabase, name: str, text: str, headers: list[str]):
    service, _, method_name = name.partition("/")
    method = DescriptorPool(database).FindServiceByName(service).FindMethodByName(method_name)
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    # A stream's requests stand one after the other; the pages have one at most.
    message = json_format.Parse(text, request())
    path, write = f"/{service}/{method_name}", request.SerializeToString
    metadata = [(key.strip().lower(), value.strip()) for key, _, value in (header.partition(":") for header in headers)]
    requests = iter([message])
    streams = channel.stream_stream(path, request_serializer=write, response_deserializer=response.FromString)
    for answer in streams(requests, metadata=metadata):
        print(json_format.MessageToJson(answer))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-d", dest="text", default="{}")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("address")
    parser.add_argument("what")
    arguments = parser.parse_args()
    with grpc.insecure_channel(arguments.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        if arguments.what == "list":
            print("\n".join(sorted(database.get_services())))
        else:
            call(channel, database, arguments.what, arguments.text, arguments.headers)


if __name__ == "__main__":
    main()
