"""Writes the curves of a run to Weights & Biases. Not pure: the network, files.

A program: `python -m services.trainer.integrations.wandb.write`. Its request says where the curves go, and every
further line of input holds the values of one step; at the end of the input the run is finished. Its one answer says
that the run is open, or why it is not. Nothing but the curves and the job's settings goes out: no code, no console
output, no facts of this machine.
"""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from services.trainer.integrations.programs import Document, output_for_answers, read_lines, write_line

MESSAGE_CHARS_MAX = 300
# In place of the node's name.
HOST = "finemesh"


def main() -> int:
    lines = read_lines()
    with output_for_answers() as answers:
        return write(next(lines), lines, answers)


def write(request: Document, points: Iterable[Document], answers: TextIO) -> int:
    """The exit code."""
    try:
        run = open_run(request)
    except ImportError:
        write_line(answers, {"error": "wandb is not installed on this node: pip install 'finemesh[wandb]'"})
        return 1
    except Exception as error:
        # Whatever the library makes of a wrong key or a server that is away.
        why = redacted(request["api_key"], f"{type(error).__name__}: {error}")[:MESSAGE_CHARS_MAX]
        write_line(answers, {"error": why})
        return 1
    write_line(answers, {"url": run.url or ""})
    try:
        for point in points:
            run.log(point["values"], step=point["step"])
    finally:
        run.finish()
    return 0


def open_run(request: Document) -> Any:
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


def redacted(secret: str, text: str) -> str:
    return text.replace(secret, "[secret]") if secret else text


if __name__ == "__main__":
    sys.exit(main())
