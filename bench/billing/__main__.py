"""All benchmarks of billing, one after the other: `make bench-billing`,
or `python -m bench.billing NAME...` for some."""

from __future__ import annotations

import asyncio
import sys

from bench.billing import booked_events, flat, holds, transfers

ALL = {"events": booked_events.main, "transfers": transfers.main, "holds": holds.main, "flat": flat.main}

if __name__ == "__main__":
    for NAME in sys.argv[1:] or ALL:
        print(f"# {NAME}", flush=True)
        asyncio.run(ALL[NAME]())
