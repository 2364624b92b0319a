"""`python -m tests.storm SEEDS [--keep-going]`: storms of one or several seeds, such as `7`, `1-100` or `3,8,20-30`.

A seed that fails prints its plan, what the checker found and where the logs are; the same seed makes the same plan
again. Exit status 1 when one failed. The mesh starts once, and anew after a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from finemesh_client.config import local_stack
from tests.storm.seed_run import Outcome, run_seed
from tests.storm.storm_mesh import StormMesh, storm_mesh
from tests.storm.truths import ledger_verifies


def seeds_of(text: str) -> list[int]:
    """`1-3,7` is 1, 2, 3 and 7."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def report(outcome: Outcome, folder: Path) -> None:
    took = ", ".join(f"{name} {at_s:.1f}" for name, at_s in outcome.took_s.items())
    verdict = "failed" if outcome.findings else "passed"
    print(f"storm {outcome.plan.seed}: {verdict} (seconds since its begin: {took})", flush=True)
    if outcome.findings:
        print("  plan:", *outcome.plan.lines(), sep="\n    ")
        print("  found:", *outcome.findings, sep="\n    ")
        print(f"  logs: {folder / 'data' / 'logs'}", flush=True)


async def ledgers_of(mesh: StormMesh) -> list[str]:
    """What is wrong with the ledger of any organization, and with what belongs to none."""
    key = local_stack(mesh.stack.folder.root)["api_key"]
    async with mesh.client(key) as client:
        return [line async for line in ledger_verifies(client, "organizations/-")]


async def main(seeds: list[int], folder: Path) -> int:
    failed: list[int] = []
    left, began_s = list(seeds), time.monotonic()
    while left:
        # A mesh that failed may hold what it should not: the next seed must not be blamed for it.
        mesh_folder = folder / f"mesh-{left[0]}"
        mesh_folder.mkdir(parents=True)
        async with storm_mesh(mesh_folder) as mesh:
            while left:
                seed = left.pop(0)
                outcome = await run_seed(mesh, seed)
                report(outcome, mesh_folder)
                if outcome.findings:
                    failed.append(seed)
                    break
            found = await ledgers_of(mesh)
            if found:
                print(f"the ledgers of all seeds of {mesh_folder}:", *found, sep="\n    ", flush=True)
                failed.append(seed)
    took_s = time.monotonic() - began_s
    lost = sorted(set(failed))
    print(f"{len(seeds) - len(lost)} of {len(seeds)} storms passed in {took_s:.0f} s; failed: {lost or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    PARSER.add_argument("seeds", type=seeds_of, help="such as 7, 1-100 or 3,8,20-30")
    PARSER.add_argument("--folder", type=Path, help="where the meshes live; none: a new temporary folder, which stays")
    OPTIONS = PARSER.parse_args()
    FOLDER = OPTIONS.folder or Path(tempfile.mkdtemp(prefix="finemesh-storm-"))
    # Not uvloop: it forks, and in a process that speaks gRPC the new one may die before it runs its program.
    sys.exit(asyncio.run(main(OPTIONS.seeds, FOLDER)))
