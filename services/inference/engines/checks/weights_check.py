"""Whether a model's weights are whole, and numbers: each is read once, a few MiB at a time. Not pure: disk.

It refuses to know architectures and torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from services.inference.engines.adapters.safetensors_file import FileProblem, check_finite, read_header
from services.inference.engines.checks.finding import Finding, listed

INDEX = "model.safetensors.index.json"


def check_weights(folder: Path) -> None:
    """Raises Finding with file and tensor."""
    held: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                tensors = read_header(file, path.stat().st_size, matrices_only=False)
                check_finite(file, tensors)
        except FileProblem as problem:
            raise Finding(path.name, str(problem)) from None
        held[path.name] = {tensor.name for tensor in tensors}
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX, held)


def _check_index(path: Path, held: dict[str, set[str]]) -> None:
    try:
        places = dict(json.loads(path.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Finding(path.name, f"is no index of weights: {error!r}") from None
    missing = {str(name) for name in places.values()} - held.keys()
    if missing:
        raise Finding(path.name, f"names files that are not there: {listed(missing)}")
    strays = {name for name, file in places.items() if name not in held[str(file)]}
    if strays:
        raise Finding(path.name, f"names tensors that its files do not hold: {listed(strays)}")
