"""Writes the curves of a run to Weights & Biases: `python -m services.trainer.outside.curves`.

The first line of stdin says where, every further one holds the values of one step; at its end the run is finished. stdout tells
when the run is open, or why not. Nothing but the curves and the job's settings goes out: no code, no console, no facts of this
machine.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

MESSAGE_CHARS_MAX = 300
# In place of the node's name.
HOST = "finemesh"


def main() -> int:
    # What the library prints goes the way of its complaints: our output holds answers only.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return write(json.loads(sys.stdin.readline()), answers)


def write(wanted: Mapping[str, Any], answers: TextIO) -> int:
    """The exit code."""
    try:
        run = open_run(wanted)
    except ImportError:
        tell(answers, error="wandb is not installed on this node: pip install 'finemesh[wandb]'")
        return 1
    except Exception as error:
        # Whatever the library makes of a wrong key or a server that is away.
        tell(answers, error=without(wanted["api_key"], f"{type(error).__name__}: {error}")[:MESSAGE_CHARS_MAX])
        return 1
    tell(answers, url=run.url or "")
    try:
        for line in sys.stdin:
            point = json.loads(line)
            run.log(point["values"], step=point["step"])
    finally:
        run.finish()
    return 0


def open_run(wanted: Mapping[str, Any]) -> Any:
    """The run, which a later attempt of the same job takes up again."""
    # An optional library, and one that takes seconds to load.
    import wandb  # noqa: PLC0415

    offline = bool(wanted["offline"])
    settings = wandb.Settings(
        mode="offline" if offline else "online",
        api_key=None if offline else wanted["api_key"],
        base_url=wanted["base_url"],
        init_timeout=wanted["init_timeout_s"],
        host=HOST,
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    return wandb.init(
        dir=wanted["folder"],
        project=wanted["project"],
        entity=wanted["entity"] or None,
        name=wanted["run_name"],
        id=wanted["run_id"],
        resume="allow",
        config=wanted["config"],
        settings=settings,
    )


def tell(answers: TextIO, **fields: str) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def without(secret: str, text: str) -> str:
    return text.replace(secret, "[secret]") if secret else text


if __name__ == "__main__":
    sys.exit(main())
