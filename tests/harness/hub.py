"""A Hugging Face hub in this process: the HTTP calls that huggingface_hub makes to create, fill
and read a model repository.

It knows repositories as lists of commits, each a whole tree; files over 64 bytes or with a weights suffix are kept as
LFS objects. `failures` makes the next calls to a path fail with a status, `before` is called with every request.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.harness.http_server import running_http

LFS_BYTES_MIN = 64


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1] if self.commits else {}

    def commit(self, files: dict[str, bytes]) -> str:
        tree = {**self.files, **files}
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()  # noqa: S324 - as git does
        self.commits.append((oid, tree))
        return oid

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        # Repositories that are read with the token only.
        self.needs_token: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        # Path part -> statuses of the next calls to it.
        self.failures: dict[str, list[int]] = {}
        self.before: Callable[[str], None] = lambda path: None
        self.url = ""

    def repository(self, name: str, files: dict[str, bytes]) -> str:
        """Makes a repository with one commit and returns that commit."""
        made = self.repositories.setdefault(name, Repository())
        return made.commit(files)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - as git does


def _is_lfs(path: str, content: bytes | None, size: int) -> bool:
    return path.endswith(".safetensors") or size > LFS_BYTES_MIN


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self._refused("POST", path):
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in path:
            self._preupload(path, json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/commit/" in path:
            self._commit(path, body)
        elif path == "/verify":
            self._answer(200, {})
        else:
            self._answer(404, {"error": "not found"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.hub.requests.append(("PUT", self.path))
        oid = self.path.rpartition("/")[2].partition("?")[0]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "digest"})
        self.hub.objects[oid] = body
        return self._answer(200, {})

    def do_GET(self) -> None:
        self._read("GET")

    def do_HEAD(self) -> None:
        self._read("HEAD")

    def _read(self, method: str) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        public = not any(name in path for name in self.hub.needs_token)
        if self._refused(method, path, anonymous=public):
            return None
        if path.startswith("/api/models/"):
            return self._info(path.removeprefix("/api/models/"), parse_qs(parts.query))
        name, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        found = self.hub.repositories[name].tree(revision) if name in self.hub.repositories else None
        if found is None or file not in found[1]:
            return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content = found[1][file]
        lfs = _is_lfs(file, content, len(content))
        etag = hashlib.sha256(content).hexdigest() if lfs else _git_oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        return self._bytes(content, headers, with_body=method == "GET")

    def _info(self, rest: str, query: dict[str, list[str]]) -> None:
        name, _, revision = rest.partition("/revision/")
        if "/tree/" in rest:
            name, _, revision = rest.partition("/tree/")
            revision = revision.partition("/")[0]
        found = self.hub.repositories[name].tree(revision or "main") if name in self.hub.repositories else None
        if found is None:
            code = "RevisionNotFound" if name in self.hub.repositories else "RepoNotFound"
            return self._answer(404, {"error": "not found"}, {"X-Error-Code": code})
        entries = []
        for path, content in sorted(found[1].items()):
            entry: dict[str, Any] = {"size": len(content)}
            if _is_lfs(path, content, len(content)):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                entry["lfs"]["oid"] = entry["lfs"]["sha256"]
            if "/tree/" in rest:
                entries.append({"type": "file", "path": path, "oid": _git_oid(content), **entry})
            else:
                entries.append({"rfilename": path, "blobId": _git_oid(content), **entry})
        if "/tree/" in rest:
            return self._answer(200, entries)
        private = self.hub.repositories[name].private
        return self._answer(200, {"id": name, "sha": found[0], "private": private, "siblings": entries})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "exists", **url})
        self.hub.repositories[name] = Repository(private=wanted.get("private") or wanted.get("visibility") == "private")
        self.hub.repositories[name].commit({})
        return self._answer(200, url)

    def _preupload(self, path: str, asked: dict[str, Any]) -> None:
        name = path.removeprefix("/api/models/").partition("/preupload/")[0]
        known = self.hub.repositories[name].files
        files = []
        for entry in asked["files"]:
            lfs = _is_lfs(entry["path"], None, entry["size"])
            there = known.get(entry["path"])
            oid = None if there is None else (hashlib.sha256(there).hexdigest() if lfs else _git_oid(there))
            mode = "lfs" if lfs else "regular"
            files.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for entry in asked["objects"]:
            answer: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/objects/{entry['oid']}?signature=secret", "header": {}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, path: str, body: bytes) -> None:
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        files: dict[str, bytes] = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.repositories[name].commit(files)
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def _refused(self, method: str, path: str, *, anonymous: bool = False) -> bool:
        self.hub.requests.append((method, path))
        self.hub.before(path)
        for part, statuses in self.hub.failures.items():
            if part in path and statuses:
                self._answer(statuses.pop(0), {"error": "as scripted"})
                return True
        if not anonymous and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._answer(401, {"error": "Invalid user token."})
            return True
        return False

    def _answer(self, status: int, document: object, headers: dict[str, str] | None = None) -> None:
        self._bytes(
            json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})}, status=status
        )

    def _bytes(self, content: bytes, headers: dict[str, str], *, status: int = 200, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    hub = Hub(token)
    with running_http(type("Handler", (_Handler,), {"hub": hub})) as hub.url:
        yield hub
