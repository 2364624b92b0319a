"""The version of all code that decides what tokens a file gives: counts and tokens made under another one are not taken for its own.

It loads none of that code.
"""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

# All that prepare.py loads of this package; a test holds the list against what is loaded.
MODULES = (
    "bounded", "chunks", "data", "durable", "failures", "messages", "methods", "order", "pack", "pairs", "parquet", "place", "plan",
    "preparation", "prepare", "prepare_settings", "reader", "row_tokenizer", "rows", "said", "shards", "spec", "spill", "template",
    "tokenized_file", "tokenizer", "tokens", "workers",
)  # fmt: skip
LIBRARIES = ("jinja2", "numpy", "pyarrow", "tokenizers")


@cache
def preparation_version() -> str:
    """16 hexadecimal digits: of the sources, whose least change may change a token, and of the libraries that they stand on."""
    digest = hashlib.sha256()
    for name in MODULES:
        source = Path(__file__).with_name(f"{name}.py").read_bytes()
        digest.update(f"{name}\0{len(source)}\0".encode())
        digest.update(source)
    for name in LIBRARIES:
        digest.update(f"{name}=={version(name)}\0".encode())
    return digest.hexdigest()[:16]
