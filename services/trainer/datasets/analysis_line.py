"""Who gets the next place for an analysis. Purposes, then organizations, then keys are served in turn.

It knows no dataset and starts nothing: an analysis waits in the line by a ticket, and somebody asks for each ticket.
"""

import asyncio
import itertools
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum

from chassis.errors import Unavailable

# Who was served when; whoever is forgotten counts as served long ago.
_TURNS_KEPT_MAX = 4096
_RETRY_AFTER_S = 1.0


class Purpose(StrEnum):
    QUOTE = "QUOTE"
    JOB = "JOB"


@dataclass(frozen=True, kw_only=True)
class Asker:
    """For whom somebody waits; both names are empty where nobody is named."""

    purpose: Purpose
    organization: str
    key: str


@dataclass(frozen=True, kw_only=True)
class LineLimits:
    """`running_max` places, of which `large_max` are for large datasets.

    One organization never has all of either; one purpose, and an organization's quotes, never have all places.
    """

    running_max: int
    large_max: int
    quotes_per_key_max: int
    waiting_max: int


class Ticket:
    """One analysis that waits or runs, and all who ask for it; without any of them it never runs."""

    def __init__(self, *, is_large: bool) -> None:
        self.is_large = is_large
        self.askers: Counter[Asker] = Counter()
        self.granted = asyncio.Event()
        # By whose turn it runs.
        self.charged: Asker | None = None


class AnalysisLine:
    def __init__(self, limits: LineLimits) -> None:
        self._limits = limits
        self._waiting: OrderedDict[Ticket, int] = OrderedDict()
        self._running: set[Ticket] = set()
        self._numbers = itertools.count(1)
        self._turns: OrderedDict[tuple[str, ...], int] = OrderedDict()

    @contextmanager
    def asking(self, ticket: Ticket, asker: Asker) -> Iterator[None]:
        """Somebody waits for this analysis meanwhile; it may be served by each asker's turn."""
        ticket.askers[asker] += 1
        self._grant()
        try:
            yield
        finally:
            ticket.askers[asker] -= 1
            # Counts of zero go.
            ticket.askers += Counter()

    @asynccontextmanager
    async def place(self, ticket: Ticket) -> AsyncIterator[None]:
        """Waits for a place and has it meanwhile. Unavailable when too many wait: another node may have room."""
        if len(self._waiting) >= self._limits.waiting_max:
            raise Unavailable(
                "DEPENDENCY_UNAVAILABLE",
                f"{self._limits.waiting_max} analyses wait on this node already; try again in a moment",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._waiting[ticket] = next(self._numbers)
        try:
            self._grant()
            await ticket.granted.wait()
            yield
        finally:
            self._waiting.pop(ticket, None)
            self._running.discard(ticket)
            self._grant()

    def _grant(self) -> None:
        while len(self._running) < self._limits.running_max:
            crowd = _Crowd(self._limits, self._running)
            found = [
                (self._turn(asker), number, ticket, asker)
                for ticket, number in self._waiting.items()
                for asker in ticket.askers
                if crowd.has_room(asker, is_large=ticket.is_large)
            ]
            if not found:
                return
            _, _, ticket, asker = min(found, key=lambda each: each[:2])
            del self._waiting[ticket]
            self._running.add(ticket)
            ticket.charged = asker
            self._note_turn(asker)
            ticket.granted.set()

    def _turn(self, asker: Asker) -> tuple[int, ...]:
        return tuple(self._turns.get(group, 0) for group in _groups(asker))

    def _note_turn(self, asker: Asker) -> None:
        turn = next(self._numbers)
        for group in _groups(asker):
            self._turns[group] = turn
            self._turns.move_to_end(group)
        while len(self._turns) > _TURNS_KEPT_MAX:
            self._turns.popitem(last=False)


class _Crowd:
    """Who runs now, counted once for all who wait."""

    def __init__(self, limits: LineLimits, running: Collection[Ticket]) -> None:
        self._limits = limits
        self._large_count = sum(ticket.is_large for ticket in running)
        charged = [(ticket.charged, ticket.is_large) for ticket in running if ticket.charged is not None]
        self._of_purpose = Counter(who.purpose for who, _ in charged)
        self._of_organization = Counter(who.organization for who, _ in charged)
        self._large_of_organization = Counter(who.organization for who, is_large in charged if is_large)
        self._quotes_of_organization = Counter(who.organization for who, _ in charged if who.purpose is Purpose.QUOTE)
        self._of_asker = Counter(who for who, _ in charged)

    def has_room(self, asker: Asker, *, is_large: bool) -> bool:
        limits, organization = self._limits, asker.organization
        own_max = _less(limits.running_max, 1)
        if self._of_purpose[asker.purpose] >= own_max or self._of_organization[organization] >= own_max:
            return False
        if is_large:
            large_max = min(limits.large_max, own_max)
            if self._large_count >= large_max or self._large_of_organization[organization] >= _less(large_max, 1):
                return False
        if asker.purpose is Purpose.JOB:
            return True
        # An organization's quotes leave a place to its jobs.
        return (
            self._quotes_of_organization[organization] < _less(limits.running_max, 2)
            and self._of_asker[asker] < limits.quotes_per_key_max
        )


def _groups(asker: Asker) -> tuple[tuple[str, ...], ...]:
    """From the widest to the narrowest; of jobs, an organization's keys are no matter."""
    purpose, organization = asker.purpose.value, asker.organization
    key = asker.key if asker.purpose is Purpose.QUOTE else ""
    return (purpose,), (purpose, organization), (purpose, organization, key)


def _less(places: int, left_to_others: int) -> int:
    return max(1, places - left_to_others)
