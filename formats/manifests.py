"""Which files belong together: their sizes and digests, the manifest that lists them, the revision that names them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from formats.strict_json import json_object

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """`path` is relative to the folder of the set; `sha256` is lower-case hex."""

    path: str
    size_bytes: int
    sha256: str


class Digested(Protocol):
    """A file of a set, whatever else is known of it."""

    @property
    def path(self) -> str: ...

    @property
    def sha256(self) -> str: ...


def revision_of(files: Iterable[Digested]) -> str:
    """The name of a set of files, derived from paths and contents: the same contents, the same revision."""
    lines = sorted(f"{file.path}\0{file.sha256}\n" for file in files)
    return "rv_" + hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def write_manifest(fields: Mapping[str, Any], files: Iterable[FileDigest]) -> str:
    """The manifest's text: `fields`, and the list of files."""
    document = {**fields, "files": [asdict(file) for file in files]}
    return json.dumps(document, indent=1, sort_keys=True)


def read_manifest(content: bytes, actual: Iterable[Digested]) -> dict[str, Any]:
    """The fields of a manifest that lists exactly the `actual` files. Raises ValueError saying what is wrong."""
    try:
        manifest = json_object(content)
        listed = {str(entry["path"]): entry["sha256"] for entry in manifest["files"]}
    except ValueError as error:
        raise ValueError(f"the manifest cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError("the manifest cannot be read: it lists no files with path and sha256") from error
    found = {file.path: file.sha256 for file in actual}
    if listed != found:
        wrong = sorted(path for path in listed.keys() | found.keys() if listed.get(path) != found.get(path))
        raise ValueError(f"files differ from the manifest: {', '.join(wrong)}")
    return manifest
