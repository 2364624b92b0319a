"""Generates gen/ from protos/ (message code, gRPC stubs, .pyi) and the import folder that buf reads.

It knows nothing of what the contracts mean.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib import resources
from pathlib import Path

import google.api
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GOOGLE_IMPORTS = ("google/api/resource.proto", "google/type/money.proto")


def proto_files() -> list[str]:
    """Every contract, as a path relative to the proto root, in a stable order."""
    return sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))


def googleapis_root() -> Path:
    """The folder of the googleapis-common-protos wheel that holds google/api, google/rpc and google/type."""
    return Path(next(iter(google.api.__path__))).parent.parent


def include_flags() -> list[str]:
    """Import roots: ours, google's, and protoc's well-known types."""
    well_known = str(resources.files("grpc_tools") / "_proto")
    return [f"-I{PROTOS}", f"-I{googleapis_root()}", f"-I{well_known}"]


def copy_googleapis(out: Path) -> None:
    """Copies the google files that ours import, because buf reads modules only below its own configuration."""
    for name in GOOGLE_IMPORTS:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(googleapis_root() / name, target)


def run(flags: list[str]) -> None:
    """One protoc run over all contracts; exits with protoc's own message when it fails."""
    if protoc.main(["protoc", *include_flags(), *flags, *proto_files()]) != 0:
        sys.exit("protoc failed; its message is above")


def main() -> None:
    """Parses the arguments and writes either generated code or a descriptor image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "gen", help="folder that receives finemesh/...")
    parser.add_argument("--googleapis", type=Path, help="only copy the imported google/*.proto files there, for buf")
    args = parser.parse_args()
    if args.googleapis:
        copy_googleapis(args.googleapis)
        return
    shutil.rmtree(args.out / "finemesh", ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    scripts = Path(sys.executable).parent
    run(
        [
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={args.out}",
            f"--grpc_python_out={args.out}",
            f"--mypy_out=quiet:{args.out}",
            f"--mypy_grpc_out=quiet:{args.out}",
        ]
    )


if __name__ == "__main__":
    main()
