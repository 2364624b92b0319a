"""What a test of a command needs: a server that answers from memory."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc
import pytest


class Serve(Protocol):
    def __call__(self, servicer: Any, *add_to_server: Callable[[Any, grpc.Server], None]) -> None: ...


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server in which one object answers for several services; the client's address and key lead there."""
    servers: list[grpc.Server] = []

    def start(servicer: Any, *add_to_server: Callable[[Any, grpc.Server], None]) -> None:
        server = grpc.server(ThreadPoolExecutor(max_workers=2))
        for add in add_to_server:
            add(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        monkeypatch.setenv("FINEMESH_ADDRESS", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("FINEMESH_API_KEY", "fm_test")

    yield start
    for server in servers:
        server.stop(grace=None).wait()
