"""An upload of 1 GiB through a gateway with digest and check of every line, beside `cp` and `sync` of the same file.

Run it: `make bench-upload`. Client, gateway and database are processes of their own on this machine; rounds are
interleaved, and both sides write to the same disk and end when the bytes are on it; ours with the answer to its report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.report import machine, spread
from chassis import pki
from finemesh.files.v1 import file_pb2
from finemesh_client import Client
from finemesh_client.config import ClientConfig
from tests.harness.polling import eventually
from tests.harness.servers import running_postgres

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024
ROUNDS = 5
GROWTH_BYTES_MAX = 64 * MIB
WORDS = ("river", "stone", "cloud", "ember", "meadow", "harbor", "lantern", "willow", "copper", "violet")
BLOCK_LINES = 2000


@dataclass(frozen=True, kw_only=True)
class Gateway:
    pid: int
    client: Client

    def resident_bytes(self, field: str) -> int:
        """Of the gateway's process; `VmRSS` is what it has, `VmHWM` the most since the last reset."""
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found.group(1)) * 1024

    def reset_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


def write_dataset(path: Path, size_bytes: int) -> None:
    """Conversations of three to seven messages, 2 KB a line, with quotes, line breaks and letters beyond ASCII."""
    lines = []
    for number in range(BLOCK_LINES):
        messages = [{"role": "system", "content": "You are a careful assistant of the harbor office."}]
        for turn in range(1 + number % 3):
            words = " ".join(WORDS[(number * 7 + turn * 3 + at * at) % len(WORDS)] for at in range(60))
            messages.append({"role": "user", "content": f'Question {number}.{turn}: what is "{words}" \u2014 and why?'})
            messages.append({"role": "assistant", "content": f"It is:\n- {words}\n- caf\u00e9 {number}"})
        lines.append(json.dumps({"messages": messages}, ensure_ascii=bool(number % 2)).encode() + b"\n")
    block = b"".join(lines)
    with path.open("wb") as out:
        for _ in range(size_bytes // len(block) + 1):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


@contextlib.asynccontextmanager
async def running_gateway(folder: Path) -> AsyncIterator[Gateway]:
    tls_dir = folder / "tls"
    tls_dir.mkdir()
    pki.create_authority(tls_dir)
    pki.issue(tls_dir, "gateway")
    ports = {name: folder / f"{name}.port" for name in ("port_file", "public_port_file", "http_port_file")}
    with tempfile.TemporaryDirectory(prefix="finemesh-postgres-", ignore_cleanup_errors=True) as home:
        async with running_postgres(Path(home)) as postgres, postgres.scratch() as url:
            environment = {
                **os.environ,
                "FINEMESH_GATEWAY_DATABASE_URL": url,
                "FINEMESH_TLS_DIR": str(tls_dir),
                "FINEMESH_ARTIFACTS_URL": f"file://{folder}/artifacts",
                **{f"FINEMESH_GATEWAY_{name.upper()}": str(path) for name, path in ports.items()},
            }
            command = [sys.executable, "-m", "services.gateway.bootstrap"]
            made = await asyncio.to_thread(
                subprocess.run, command, env=environment, cwd=ROOT, check=True, capture_output=True
            )
            with (folder / "gateway.log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "services.gateway.main", env=environment, cwd=ROOT, stdout=log, stderr=log
                )
            try:
                await eventually(lambda: asyncio.sleep(0, ports["port_file"].exists()), bool)
                address = f"127.0.0.1:{ports['public_port_file'].read_text()}"
                config = ClientConfig(address=address, api_key=json.loads(made.stdout)["api_key"])
                async with Client(config) as client:
                    yield Gateway(pid=process.pid, client=client)
            finally:
                process.terminate()
                await process.wait()


def copy_and_sync(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    took_s = time.perf_counter() - began
    target.unlink()
    return took_s


async def upload(gateway: Gateway, source: Path) -> tuple[float, int]:
    """How long it took, and by how much the gateway's memory grew at the most."""
    before = gateway.resident_bytes("VmRSS")
    gateway.reset_peak()
    began = time.perf_counter()
    file = await gateway.client.files.upload(source)
    took_s = time.perf_counter() - began
    grown = gateway.resident_bytes("VmHWM") - before
    if file.state != file_pb2.FILE_STATE_READY:
        raise RuntimeError(f"the file is not sound: {file.validation}")
    await gateway.client.files.delete(file.name)
    return took_s, grown


async def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = folder / "train.jsonl"
        write_dataset(source, options.mib * MIB)
        size_mib = source.stat().st_size / MIB
        ours: list[float] = []
        peer: list[float] = []
        growths: list[int] = []
        async with running_gateway(folder) as gateway:
            for number in range(options.rounds):
                took_s, grown = await upload(gateway, source)
                ours.append(size_mib / took_s)
                growths.append(grown)
                peer.append(size_mib / await asyncio.to_thread(copy_and_sync, source, folder / "copy"))
                print(
                    f"round {number + 1}: ours {ours[-1]:.0f} MiB/s, cp and sync {peer[-1]:.0f} MiB/s, "
                    f"the gateway's memory grew by {grown / MIB:.0f} MiB",
                    flush=True,
                )
        print(f"on {machine()}; {size_mib:.0f} MiB; ours {spread(ours)} MiB/s, cp and sync {spread(peer)} MiB/s")
        print(f"the gateway's memory grew by at most {max(growths) / MIB:.0f} MiB of {GROWTH_BYTES_MAX // MIB} allowed")
        a, b = median(ours), median(peer)
        print(f"bench upload: ratio {a / b:.2f} (ours {a:.0f} MiB/s, peer {b:.0f} MiB/s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.upload")
    parser.add_argument("--mib", type=int, default=1024, help="size of the file")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--folder", type=Path, help="where the bytes go; the system's folder for temporary files if not given"
    )
    asyncio.run(main(parser.parse_args()))
