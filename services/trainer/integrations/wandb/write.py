"""Writes the curves of a run to Weights & Biases. Not pure: the network, files.

A program: `python -m services.trainer.integrations.wandb.write`. Its request says where the curves go, and every
further line of input holds the values of one step; at the end of the input the run is finished. Its one answer says
that the run is open, or why it is not. Nothing but the curves and the job's settings goes out: no code, no console
output, no facts of this machine.
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
    # What the library prints goes to standard error: our output holds answers only.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return write(json.loads(sys.stdin.readline()), answers)


def write(request: Mapping[str, Any], answers: TextIO) -> int:
    """The exit code."""
    try:
        run = open_run(request)
    except ImportError:
        answer(answers, error="wandb is not installed on this node: pip install 'finemesh[wandb]'")
        return 1
    except Exception as error:
        # Whatever the library makes of a wrong key or a server that is away.
        answer(answers, error=redacted(request["api_key"], f"{type(error).__name__}: {error}")[:MESSAGE_CHARS_MAX])
        return 1
    answer(answers, url=run.url or "")
    try:
        for line in sys.stdin:
            point = json.loads(line)
            run.log(point["values"], step=point["step"])
    finally:
        run.finish()
    return 0


def open_run(request: Mapping[str, Any]) -> Any:
    """The run, which a later attempt of the same job takes up again."""
    # An optional library, and one that takes seconds to load.
    import wandb  # noqa: PLC0415

    offline = bool(request["offline"])
    settings = wandb.Settings(
        mode="offline" if offline else "online",
        api_key=None if offline else request["api_key"],
        base_url=request["base_url"],
        init_timeout=request["init_timeout_s"],
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
        dir=request["folder"],
        project=request["project"],
        entity=request["entity"] or None,
        name=request["run_name"],
        id=request["run_id"],
        resume="allow",
        config=request["config"],
        settings=settings,
    )


def answer(answers: TextIO, **fields: str) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def redacted(secret: str, text: str) -> str:
    return text.replace(secret, "[secret]") if secret else text


if __name__ == "__main__":
    sys.exit(main())
