"""One of several processes of a run, short of memory where it is told to be, for tests: `python -m
tests.train.tight_worker WORKDIR`.

RANK and what torch's `env://` wants say which process it is. FINEMESH_TEST_FULL_AT is a list of faults, each
"rank:kind:pass:place": in the `pass`-th look at a micro-batch of its `kind` ("step" or "evaluation", counted from 1)
the process `rank` finds no memory, once, in the second layer of the model ("forward") or on the way back through the
first one ("backward"). Of the kind "rows" it finds none when it lays the rows of a step out for the `pass`-th time,
ahead or again.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from services.trainer.train.launcher import work
from services.trainer.train.loop import prefetch as ahead
from services.trainer.train.losses.objective import Preferences, Supervised
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec

_LAYERS = 2
_passes: Counter[str] = Counter()
_armed: str | None = None
_layer = 0


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("out of memory, for a test")


def arm_when_due(kind: type[Any], method: str, name: str, faults: dict[tuple[str, int], str]) -> None:
    whole = getattr(kind, method)

    def counting(self: Any, model: Any, batch: Any, *scale: float) -> Any:
        global _armed, _layer
        _passes[name] += 1
        _armed, _layer = faults.get((name, _passes[name])), 0
        return whole(self, model, batch, *scale)

    setattr(kind, method, counting)


def watch_rows(faults: dict[tuple[str, int], str]) -> None:
    whole = vars(ahead)["batches_of_step"]

    def lay(*arguments: Any) -> Any:
        _passes["rows"] += 1
        if ("rows", _passes["rows"]) in faults:
            no_memory()
        return whole(*arguments)

    vars(ahead)["batches_of_step"] = lay


def watch_layers() -> None:
    whole = LlamaMLP.forward

    def forward(self: Any, hidden: Any) -> Any:
        global _layer, _armed
        layer, _layer = _layer, (_layer + 1) % _LAYERS
        if _armed == "forward" and layer == 1:
            _armed = None
            no_memory()
        output = whole(self, hidden)
        # A pass without a gradient, for the reference of preferences, has no way back.
        if _armed == "backward" and layer == 0 and output.requires_grad:
            _armed = None
            output.register_hook(no_memory)
        return output

    LlamaMLP.forward = forward


def main() -> None:
    asked = [fault.split(":") for fault in os.environ["FINEMESH_TEST_FULL_AT"].split()]
    faults = {(kind, int(number)): place for rank, kind, number, place in asked if rank == os.environ["RANK"]}
    for kind in (Supervised, Preferences):
        arm_when_due(kind, "loss_sum", "step", faults)
        arm_when_due(kind, "sums", "evaluation", faults)
    watch_layers()
    watch_rows(faults)
    workdir = Path(sys.argv[1])

    def emit(event_type: str, /, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"type": event_type, **fields}) + "\n")
        sys.stdout.flush()

    work(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, emit)


if __name__ == "__main__":
    main()
    # As the real worker ends: threads of torch that outlive a run sometimes abort an interpreter that shuts down.
    sys.stderr.flush()
    os._exit(0)
