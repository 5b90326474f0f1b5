"""The floor of a unary call: a bare grpc.aio server with TLS that answers every Publish with a constant. A process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import uvloop

from sealpush.v1 import publish_pb2


async def echo(request: publish_pb2.PublishRequest, context: Any) -> publish_pb2.PublishResponse:
    accepted = publish_pb2.Accepted(message_id=bytes(16), devices=1)
    return publish_pb2.PublishResponse(result=publish_pb2.PublishResult(request_id=request.request_id, accepted=accepted))


HANDLER = grpc.unary_unary_rpc_method_handler(
    echo,
    request_deserializer=publish_pb2.PublishRequest.FromString,
    response_serializer=publish_pb2.PublishResponse.SerializeToString,
)


async def serve(certificate: str, private_key: str) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("sealpush.v1.Publishing", {"Publish": HANDLER}),))
    pair = (Path(private_key).read_bytes(), Path(certificate).read_bytes())
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    print(port, flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0.1)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
