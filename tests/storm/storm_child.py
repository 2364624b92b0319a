"""A training child of a storm: `python -m tests.storm.storm_child --workdir W`. A fake child that is watched.

It takes a step for each line of the training file, as long as the first line says, and tells the witness of each. On
its node's only device it is alone, or the witness hears of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from tests.harness.fake_child import TOKENS_PER_STEP, FakeRun, exit_when_orphaned
from tests.storm import witness

# A child that was killed a moment ago may still be on its way out.
DEVICE_WAIT_S = 2.0
LOOK_S = 0.02


class StormRun(FakeRun):
    def __init__(self, workdir: Path) -> None:
        super().__init__(workdir)
        self.folder = witness.folder_above(workdir)
        self.told = witness.Witness(self.folder, "steps")
        # <data>/work/<process>/<node>/work/<attempt>
        self.node = workdir.parent.parent.name

    def read_script(self) -> dict[str, Any]:
        lines = (self.workdir / self.spec["train_file"]).read_text().splitlines()
        said = json.loads(json.loads(lines[0])["messages"][0]["content"])
        return {"steps": len(lines), "checkpoint_every": 3, "step_s": said["step_s"]}

    def begin(self) -> None:
        deadline = time.monotonic() + DEVICE_WAIT_S
        while not witness.take(self.folder, self.node):
            if time.monotonic() > deadline:
                witness.Witness(self.folder, "conflicts").tell(node=self.node, job=self.spec["job_id"], pid=os.getpid())
                break
            time.sleep(LOOK_S)
        self.told.tell(job=self.spec["job_id"], pid=os.getpid(), node=self.node, began=self.resumed_step())

    def finish(self, step: int) -> None:
        self.told.tell(job=self.spec["job_id"], pid=os.getpid(), step=step, tokens=TOKENS_PER_STEP)
        super().finish(step)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, required=True)
    run = StormRun(parser.parse_args().workdir)
    signal.signal(signal.SIGTERM, lambda _number, _frame: run.stop.set())
    threading.Thread(target=exit_when_orphaned, daemon=True).start()
    run.begin()
    return run.live()


if __name__ == "__main__":
    os._exit(main())
