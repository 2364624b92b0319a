"""How the agent starts its programs for places outside: what they see of this machine, and how their one question is asked.

They get a home of their own, so that no credentials of the node's user are found, and the ways through a proxy.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.trainer.spawn import Spawned, spawn_module

LINE_BYTES_MAX = 64 * 1024
_PASSED_ON = frozenset(
    {"PATH", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD"}
    | {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
)


def environment_of(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """What a program sees: no addresses of the mesh, no credentials of the store or of the node's user."""
    return {name: value for name, value in environment.items() if name in _PASSED_ON} | {
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # One way up, the one that is tested; the other needs a native library and a second kind of server.
        "HF_HUB_DISABLE_XET": "1",
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONUNBUFFERED": "1",
    }


async def start(module: str, environment: Mapping[str, str]) -> Spawned:
    return await spawn_module(
        module, (), threads=1, gpu_uuid="", line_bytes_max=LINE_BYTES_MAX, environment=environment
    )


async def say(process: Spawned, document: Mapping[str, Any]) -> None:
    """One line. OSError when the program is gone; it blocks a thread while the program does not read."""
    await asyncio.to_thread(process.stdin.write, json.dumps(document).encode() + b"\n")


async def heard(process: Spawned) -> Mapping[str, Any] | None:
    """The next line of its answer; None when it ended, or said something else than a JSON object."""
    with contextlib.suppress(ValueError):
        answer = json.loads(await process.stdout.readline())
        return answer if isinstance(answer, dict) else None
    return None


async def read_away(stream: asyncio.StreamReader) -> None:
    """What a library complains of may hold what is secret, and a full pipe would stop it: it is read and dropped."""
    with contextlib.suppress(OSError):
        while await stream.read(LINE_BYTES_MAX):
            continue


async def bury(process: Spawned) -> None:
    process.kill()
    await process.wait()
    process.close()
