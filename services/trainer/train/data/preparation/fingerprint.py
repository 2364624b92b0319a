"""The version of all code that decides what tokens a file gives. It loads none of that code.

Counts and tokens that were made under another version are not taken for those of this one.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

# Below the root of the sources. prepare.py loads modules of these folders and of no other; a test holds them against
# what is loaded.
FOLDERS = (
    "formats",
    "formats/prompts",
    "services/trainer/train/settings",
    "services/trainer/train/disk",
    "services/trainer/train/data/tokens",
    "services/trainer/train/data/packing",
    "services/trainer/train/data/preparation",
)
LIBRARIES = ("jinja2", "numpy", "pyarrow", "tokenizers")
_ROOT = Path(__file__).parents[5]


@cache
def preparation_version() -> str:
    """16 hexadecimal digits of the sources, whose least change may change a token, and of the libraries that they stand
    on."""
    digest = hashlib.sha256()
    for path in _sources():
        source = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\0{len(source)}\0".encode())
        digest.update(source)
    for name in LIBRARIES:
        digest.update(f"{name}=={version(name)}\0".encode())
    return digest.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((_ROOT / folder).glob("*.py"))
