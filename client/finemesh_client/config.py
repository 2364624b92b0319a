"""Where the mesh is and who is calling: flags, then the environment, then the running local stack.

It opens no connection.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


class ConfigError(Exception):
    """No address or key was found; the message says where they are looked for."""


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How to reach the mesh.

    address: `host:port` of the gateway's public gRPC port; with `https://` in front the channel uses TLS.
    http_url: base URL of the OpenAI-shaped edge, ending in `/v1`; empty when not known.
    timeout_s: deadline of a unary call.
    attempts: how often a safe call is tried when the mesh cannot be reached.
    """

    address: str
    api_key: str
    http_url: str = ""
    timeout_s: float = 60.0
    attempts: int = 5
    message_size_bytes_max: int = 8 * 1024 * 1024


def default_data_dir() -> Path:
    """The data folder of the local stack: FINEMESH_DATA_DIR, else ~/.finemesh."""
    return Path(os.environ.get("FINEMESH_DATA_DIR") or Path.home() / ".finemesh")


def local_stack(data_dir: Path) -> dict[str, str]:
    """Addresses and first key of the local stack in that folder; empty when none is there."""
    described = data_dir / "stack.json"
    if not described.is_file():
        return {}
    stack = json.loads(described.read_text())
    found = {"address": stack["public_grpc"], "http_url": f"{stack['http_url']}/v1"}
    key_file = Path(stack["api_key_file"])
    if key_file.is_file():
        found["api_key"] = str(json.loads(key_file.read_text())["api_key"])
    return found


def find_config(
    address: str | None = None, api_key: str | None = None, http_url: str | None = None, data_dir: Path | None = None
) -> ClientConfig:
    """Fills what was not given from FINEMESH_ADDRESS, FINEMESH_API_KEY and FINEMESH_HTTP_URL, then from the local
    stack.

    Raises ConfigError when no address or key is found.
    """
    stack = local_stack(data_dir or default_data_dir())
    address = address or os.environ.get("FINEMESH_ADDRESS") or stack.get("address")
    api_key = api_key or os.environ.get("FINEMESH_API_KEY") or stack.get("api_key")
    http_url = http_url or os.environ.get("FINEMESH_HTTP_URL") or stack.get("http_url", "")
    if not address:
        raise ConfigError(
            "no mesh found: start one with `finemesh up`, or set FINEMESH_ADDRESS=host:port "
            f"(looked for a local stack in {data_dir or default_data_dir()})"
        )
    if not api_key:
        raise ConfigError(
            "no API key found: set FINEMESH_API_KEY=fm_... (an admin makes one with `finemesh keys create`)"
        )
    return ClientConfig(address=address, api_key=api_key, http_url=http_url)
