"""The training child: `python -m services.trainer.train.main --workdir W`. Events on stdout, logs on stderr.

W/spec.json holds the settings (settings/spec_json.py). The child does not outlive its agent: it ends when its standard
input does.

Exit codes: 0 finished or stopped, 2 failed by data or settings, 3 failed by the platform, 4 the agent is gone.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

from services.trainer.train.launcher import launch, work, write_failure
from services.trainer.train.runtime.event_stream import EXIT_ORPHANED, EventStream, claim_stdout
from services.trainer.train.runtime.failure_causes import explain, failure_to_json
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec

EXIT_OK = 0
EXIT_USER = 2
EXIT_PLATFORM = 3
_PR_SET_PDEATHSIG = 1
# Read by the libraries when they are loaded: exactness (one code path in MKL and cuBLAS), no network, and
# worker threads that sleep when idle: spinning ones cost ten times the step when other processes want the same cores.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MKL_CBWR": "AVX2",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


def main() -> int:
    arguments = _arguments()
    emit = claim_stdout()
    _die_with_parent()
    if arguments.worker:
        return _work(arguments.workdir, emit)
    stop = threading.Event()

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask_to_stop)
    # On Ctrl-C the whole group hears SIGINT; the agent decides what becomes of the run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    workdir = _await_work(emit) if arguments.wait else arguments.workdir
    if not arguments.no_stdin_watch:
        threading.Thread(target=_exit_when_orphaned, daemon=True).start()
    try:
        run(workdir, emit, stop)
    except Failure as failure:
        return _report(emit, failure)
    except Exception as error:
        traceback.print_exc()
        return _report(emit, explain(error))
    return EXIT_OK


def run(workdir: Path, emit: EventStream, stop: threading.Event) -> None:
    """Reads the spec first: a wrong one is refused before the seconds that torch takes to load."""
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    if spec.processes > 1 or spec.gang is not None:
        emit.lend_stdout()
        launch(spec, workdir, stop)
        return
    # Loading torch before the environment above is set would fix the libraries' choices.
    from services.trainer.train.loop.run import train  # noqa: PLC0415

    train(spec, workdir, emit, stop.is_set)


def _work(workdir: Path, emit: EventStream) -> int:
    """One of several processes. The elastic launcher ends it by SIGTERM, reports why, and passes on a request to
    stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, emit)
    except Failure as failure:
        write_failure(failure)
        return EXIT_USER if failure.kind == "user" else EXIT_PLATFORM
    except Exception as error:
        traceback.print_exc()
        write_failure(explain(error))
        return EXIT_PLATFORM
    return EXIT_OK


def _await_work(emit: EventStream) -> Path:
    """A warm child: the libraries are loaded before there is work; one line of standard input brings it."""
    from services.trainer.train.loop import run as loop  # noqa: F401, PLC0415

    emit("ready")
    line = sys.stdin.readline()
    if not line:
        os._exit(EXIT_ORPHANED)
    workdir = Path(json.loads(line)["workdir"]).absolute()
    # Shows to whoever looks at the process what it works on, as the command line of a cold child does.
    os.chdir(workdir)
    return workdir


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One fine-tuning run.")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--workdir", type=Path, help="folder with spec.json")
    work.add_argument("--wait", action="store_true", help='load the libraries, then read {"workdir": ...} from stdin')
    parser.add_argument(
        "--worker", action="store_true", help="be one process of a run, started by the elastic launcher"
    )
    parser.add_argument("--no-stdin-watch", action="store_true", help="run on when stdin ends (by hand only)")
    return parser.parse_args()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit_when_orphaned() -> None:
    while os.read(0, 4096):
        continue
    os._exit(EXIT_ORPHANED)


def _report(emit: EventStream, failure: Failure) -> int:
    emit("failed", **failure_to_json(failure))
    return EXIT_USER if failure.kind == "user" else EXIT_PLATFORM


if __name__ == "__main__":
    # Not sys.exit: interpreter shutdown with torch loaded takes a good part of a second, and all is on disk.
    code = main()
    sys.stderr.flush()
    os._exit(code)
