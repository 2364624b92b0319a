"""Who may upload and have an upload checked now: bounds for each key and organization, and fair turns. Pure."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from chassis.errors import ResourceExhausted

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Uploader:
    organization_id: str
    key_id: str


class UploadSlots:
    """Uploads in flight: `uploads_max` in all, of which one organization and one key get fewer."""

    def __init__(self, *, uploads_max: int, per_organization_max: int, per_key_max: int) -> None:
        self._limits = (
            ("uploads_max", uploads_max, "all"),
            ("uploads_per_organization_max", per_organization_max, "organization"),
            ("uploads_per_key_max", per_key_max, "key"),
        )
        self._taken: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def take(self, uploader: Uploader) -> Iterator[None]:
        """One slot meanwhile; ResourceExhausted where there is none."""
        names = {"all": "", "organization": uploader.organization_id, "key": uploader.key_id}
        for limit, limit_value, group in self._limits:
            taken = self._taken[group, names[group]]
            if taken >= limit_value:
                whose = "in all" if group == "all" else f"of this {group}"
                raise ResourceExhausted(
                    "CAPACITY_EXHAUSTED",
                    f"{taken} uploads {whose} are in flight, as many as {limit} allows; "
                    "try again when one of them has ended",
                    metadata={"limit": limit, "limit_value": str(limit_value)},
                    retry_after_s=_RETRY_AFTER_S,
                )
        groups = list(names.items())
        self._taken.update(groups)
        try:
            yield
        finally:
            self._taken.subtract(groups)
            # Counts of zero go.
            self._taken += Counter()


class CheckPlaces:
    """Places for checks that begin when all bytes are there, such as those of Parquet files.

    Organizations are served in turn, and one never has all places, so that another's check waits for none of its own.
    """

    def __init__(self, places_max: int) -> None:
        self._places_max = places_max
        self._running: Counter[str] = Counter()
        # Whoever was served longest ago comes first.
        self._waiting: OrderedDict[str, list[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def take(self, organization_id: str) -> AsyncIterator[None]:
        """Waits for a place and has it meanwhile."""
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(organization_id, []).append(granted)
        self._grant()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                self._running[organization_id] -= 1
            else:
                self._leave(organization_id, granted)
            self._running += Counter()
            self._grant()

    def _grant(self) -> None:
        of_one_max = max(1, self._places_max - 1)
        while self._running.total() < self._places_max:
            turn = next((name for name in self._waiting if self._running[name] < of_one_max), None)
            if turn is None:
                return
            granted = self._waiting[turn][0]
            self._leave(turn, granted)
            if turn in self._waiting:
                self._waiting.move_to_end(turn)
            if not granted.cancelled():
                self._running[turn] += 1
                granted.set_result(None)

    def _leave(self, organization_id: str, granted: asyncio.Future[None]) -> None:
        line = self._waiting.get(organization_id, [])
        if granted in line:
            line.remove(granted)
        if not line:
            self._waiting.pop(organization_id, None)
