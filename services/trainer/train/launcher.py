"""Several processes for one run: this child runs torch's elastic launcher, and its workers train. Not pure: processes.

One attempt is one life: nothing is restarted here, since whoever started this child goes on from a checkpoint. A worker
writes how it failed into the file that the elastic launcher names, and rank 0 emits everything else. It knows neither
data nor weights.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from services.trainer.train.runtime.event_stream import Emit
from services.trainer.train.runtime.failure_causes import (
    DIED,
    FailureBoard,
    explain,
    failure_from_json,
    failure_to_json,
    imprecision,
)
from services.trainer.train.settings.failures import Failure, platform_failure
from services.trainer.train.settings.spec import Gang, Spec

MODULE = "services.trainer.train.main"
# In the work folder: asks the run to end after its step. A signal would reach the workers one by one.
STOP_FLAG = "stop-asked"
# What is left of a failed group is of no use to anybody.
SHUTDOWN_S_MAX = 5
RENDEZVOUS_S_MAX = 600
STORE_S_MAX = 10
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def launch(spec: Spec, workdir: Path, stop: threading.Event) -> None:
    """Returns when all workers of this machine have finished; raises the Failure that ended them."""
    # The launcher alone needs them, and a child of one process never pays for their loading.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    (workdir / STOP_FLAG).unlink(missing_ok=True)
    threading.Thread(target=_pass_on, args=(stop, workdir / STOP_FLAG), daemon=True).start()
    _prepare_environment(spec)
    gang = spec.gang
    config = LaunchConfig(
        min_nodes=gang.nodes if gang else 1,
        max_nodes=gang.nodes if gang else 1,
        nproc_per_node=spec.processes,
        run_id=gang.id if gang else spec.job_id,
        rdzv_backend="c10d",
        rdzv_endpoint=gang.endpoint if gang else "localhost:0",
        rdzv_configs=_rendezvous_settings(gang),
        local_addr=(gang.address or None) if gang else "localhost",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_S_MAX,
        # SIGTERM asks the run to end after its step; it is not the end of the workers.
        signals_to_handle="SIGHUP",
        logs_specs=DefaultLogsSpecs(log_dir=str(workdir / "elastic")),
    )
    try:
        elastic_launch(config, sys.executable)("-m", MODULE, "--workdir", str(workdir), "--worker")
    except ChildFailedError as error:
        raise _root_cause(error.failures.values()) from error


def work(spec: Spec, workdir: Path, emit: Emit) -> None:
    """A worker's part: joins the others and trains. Only rank 0 emits events. Raises the failure that ended the run,
    whichever process had it."""
    from services.trainer.train.loop.run import train  # noqa: PLC0415
    from services.trainer.train.runtime.process_group import join_group, leave_group  # noqa: PLC0415

    group = join_group(
        spec.device, sharded=spec.parallelism == "sharded", leading_node=spec.gang is None or spec.gang.leads
    )
    if spec.device.startswith("cuda"):
        spec = replace(spec, device=f"cuda:{group.local_rank}")
    flag = workdir / STOP_FLAG
    try:
        train(spec, workdir, emit if group.leads else _silent, flag.exists, group)
        group.wait()
    except Exception as error:
        if not isinstance(error, Failure):
            traceback.print_exc()
        failure, gang = explain(error), spec.gang
        # Processes of one machine report to their launcher, which then knows every cause.
        raise (failure if gang is None else FailureBoard(lambda: _rendezvous_store(gang)).leave(failure)) from error
    leave_group()


def write_failure(failure: Failure) -> None:
    """Writes how a worker failed into the file that the launcher reads."""
    path = os.environ.get(_ERROR_FILE)
    if path is None:
        return
    document = {"message": failure.message, "timestamp": int(time.time()), "failure": failure_to_json(failure)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(document), encoding="utf-8")


def _prepare_environment(spec: Spec) -> None:
    # A warm child has left the folder that it was started in, where `-m` found this package.
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if spec.gang is None and sys.platform == "linux":
        # Processes of one machine need no network, whatever its name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _rendezvous_settings(gang: Gang | None) -> dict[str, Any]:
    """The launchers meet on the leading machine, whatever its name resolves to. The others wait until it is there."""
    settings: dict[str, Any] = {"timeout": RENDEZVOUS_S_MAX, "read_timeout": RENDEZVOUS_S_MAX}
    return settings if gang is None else {**settings, "is_host": gang.leads}


def _rendezvous_store(gang: Gang) -> Any:
    """The store of the rendezvous, which is in the launcher of the leading machine. The store of the processes may be
    elsewhere."""
    from torch.distributed import TCPStore  # noqa: PLC0415

    host, _, port = gang.endpoint.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=STORE_S_MAX))


def _root_cause(failures: Iterable[Any]) -> Failure:
    """The failure that says most. When one worker fails, the others fail at their next exchange with it."""
    return min((_failure_of(each) for each in failures), key=imprecision)


def _failure_of(death: Any) -> Failure:
    word = (death.error_file_data or {}).get("failure")
    if word is not None:
        return failure_from_json(word)
    how = f"was killed by signal {-death.exitcode}" if death.exitcode < 0 else f"ended with code {death.exitcode}"
    return platform_failure(
        "TRAINING_FAILED", f"process {death.local_rank} of the run {how} without a word", {"cause": DIED}
    )


def _pass_on(stop: threading.Event, flag: Path) -> None:
    stop.wait()
    flag.touch()


def _silent(_event_type: str, /, **_fields: Any) -> None:
    pass
