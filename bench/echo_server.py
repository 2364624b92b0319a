"""The peer of the edge benchmark: a bare grpc.aio server that answers every call with the same bytes.
It checks nothing.

`python -m bench.echo_server ANSWER_HEX` prints its port and serves until its stdin closes.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
import uvloop

METHOD = "/bench.Echo/Get"


class Echo(grpc.GenericRpcHandler):
    """One method, one answer."""

    def __init__(self, answer: bytes) -> None:
        async def get(request: bytes, context: object) -> bytes:
            return answer

        self._handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(get)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handler if handler_call_details.method == METHOD else None


async def main(answer: bytes) -> None:
    server = grpc.aio.server(handlers=[Echo(answer)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(main(bytes.fromhex(sys.argv[1])))
