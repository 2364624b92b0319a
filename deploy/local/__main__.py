"""`python -m deploy.local up` runs the mesh until Ctrl-C; `python -m deploy.local stop` ends one from elsewhere."""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.local.folder import DataFolder, StackRunning
from deploy.local.stack import Stack, StackOptions
from deploy.local.supervisor import ProcessFailed
from deploy.local.table import SERVICES, Service

NODES_MAX = 16
STOP_TIMEOUT_S = 90.0
STOP_POLL_S = 0.1


def main(arguments: Sequence[str] | None = None, services: tuple[Service, ...] = SERVICES) -> int:
    options = _parser().parse_args(arguments)
    if options.action == "stop":
        return stop(options.data)
    return asyncio.run(up(options, services))


async def up(options: argparse.Namespace, services: tuple[Service, ...]) -> int:
    """Exit status 0 after an orderly stop, 1 when the stack could not be started or kept alive."""
    began = time.monotonic()
    # With --json-ready the ready line is alone on stdout, so that a program can read it.
    human = sys.stderr if options.json_ready else sys.stdout
    stack = Stack(
        StackOptions(
            data=options.data,
            engine=options.engine,
            nodes=options.nodes,
            services=services,
            terminal=None if options.quiet else human,
            notices=human,
            log_format=os.environ.get("FINEMESH_LOG_FORMAT", "console"),
        )
    )
    asked = _stop_on_signals(stack)
    try:
        starting = asyncio.create_task(stack.start())
        if not await _unless_asked(starting, asked):
            return 0
        _announce(stack, options, time.monotonic() - began)
        await _unless_asked(asyncio.create_task(stack.wait_failed()), asked)
    except (StackRunning, ProcessFailed, TimeoutError, OSError, RuntimeError) as error:
        print(f"finemesh     | {error}", file=sys.stderr, flush=True)
        return 1
    else:
        return 0
    finally:
        await stack.stop()


def stop(data: Path) -> int:
    """Asks the launcher of this data folder to stop and waits until it has."""
    folder = DataFolder(data)
    holder = folder.holder()
    if holder is None:
        print(f"no stack runs on {folder.root}")
        return 0
    os.kill(holder, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while folder.holder() is not None:
        if time.monotonic() > deadline:
            print(f"the stack on {folder.root} (process {holder}) has not stopped yet", file=sys.stderr)
            return 1
        time.sleep(STOP_POLL_S)
    return 0


def _stop_on_signals(stack: Stack) -> asyncio.Event:
    """The first signal asks for an orderly stop; a second one, by somebody who will not wait, kills everything."""
    asked = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set():
            stack.kill_all()
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # started by nohup: outliving the terminal is what was asked for
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return asked


async def _unless_asked(work: asyncio.Task[None], asked: asyncio.Event) -> bool:
    """Awaits `work`, or cancels it when a stop is asked for: then the answer is False."""
    waiting = asyncio.create_task(asked.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if work.done():
        await work
        return True
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return False


def _announce(stack: Stack, options: argparse.Namespace, took_s: float) -> None:
    described = stack.describe()
    if options.json_ready:
        print(json.dumps({**described, "start_s": round(took_s, 3)}), flush=True)
        return
    lines = [f"ready in {took_s:.1f} s; logs in {described['logs_dir']}"]
    if "public_grpc" in described:
        lines += [f"gRPC  {described['public_grpc']}", f"HTTP  {described['http_url']}/v1"]
    if stack.folder.api_key_file.exists():
        key = json.loads(stack.folder.api_key_file.read_text())["api_key"]
        lines.append(f"key   {key}  (kept in {stack.folder.api_key_file})")
    for line in lines:
        print(f"finemesh     | {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    default_data = Path(os.environ.get("FINEMESH_DATA_DIR") or Path.home() / ".finemesh")
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    start = actions.add_parser("up", help="start the mesh and keep it alive until Ctrl-C")
    start.add_argument(
        "--engine", choices=("vllm", "stub"), default=os.environ.get("FINEMESH_INFERENCE_ENGINE") or None
    )
    start.add_argument("--nodes", type=_nodes, default=1, help=f"trainer nodes, 1 to {NODES_MAX}")
    start.add_argument("--quiet", action="store_true", help="keep the services' lines in their files")
    start.add_argument("--json-ready", action="store_true", help="print one line of JSON on stdout when ready")
    end = actions.add_parser("stop", help="stop the mesh that runs on a data folder")
    for action in (start, end):
        action.add_argument("--data", type=Path, default=default_data, help=f"data folder (default {default_data})")
    return parser


def _nodes(text: str) -> int:
    number = int(text)
    if not 1 <= number <= NODES_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {NODES_MAX}")
    return number


if __name__ == "__main__":
    sys.exit(main())
