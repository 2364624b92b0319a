"""A Weights & Biases server in this process, as much of it as the real library needs to open a run
and stream its history.

It answers every GraphQL call with one document that holds what any of them asks for, and keeps the history
and who sent it.
"""

import base64
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.harness.http_server import running_http

ENTITY = "acme"


class WandbServer:
    def __init__(self, key: str) -> None:
        self.key = key
        self.url = ""
        # Points of each run, by `{entity}/{project}/{run id}`.
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.complete: set[str] = set()
        # Everything that was sent, as it came.
        self.bodies: list[bytes] = []


def _document(variables: dict[str, Any]) -> dict[str, Any]:
    project = {"id": "p1", "name": variables.get("project") or "p", "entity": {"id": "e1", "name": ENTITY}}
    bucket = {
        "id": "b1",
        "name": variables.get("name") or "run",
        "displayName": variables.get("displayName") or "run",
        "description": "",
        "config": "{}",
        "sweepName": None,
        "project": project,
        "historyLineCount": 0,
    }
    return {
        "viewer": {"id": "u1", "username": ENTITY, "entity": ENTITY, "flags": "{}", "teams": {"edges": []}},
        "model": {"bucket": None, "entity": {"name": ENTITY}},
        "createRunFiles": {"runID": "b1", "uploadHeaders": [], "files": []},
        "upsertBucket": {"bucket": bucket, "inserted": True},
    }


class _Handler(BaseHTTPRequestHandler):
    server_state: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        state = self.server_state
        state.bodies.append(body)
        scheme, _, credentials = (self.headers.get("authorization") or " ").partition(" ")
        if scheme != "Basic" or base64.b64decode(credentials) != f"api:{state.key}".encode():
            return self._answer(401, {"errors": [{"message": "user is not logged in"}]})
        document = json.loads(body)
        if self.path == "/graphql":
            return self._answer(200, {"data": _document(document.get("variables") or {})})
        run = self.path.removeprefix("/files/").removesuffix("/file_stream")
        lines = document.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        state.history.setdefault(run, []).extend(json.loads(line) for line in lines)
        if document.get("complete"):
            state.complete.add(run)
        return self._answer(200, {"exitcode": None, "limits": {}})

    def _answer(self, status: int, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def running_wandb(key: str) -> Iterator[WandbServer]:
    state = WandbServer(key)
    with running_http(type("Handler", (_Handler,), {"server_state": state})) as state.url:
        yield state
