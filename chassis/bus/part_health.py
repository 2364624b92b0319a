"""One part of the bus, as health is asked for it: well while none of its streams is in trouble. It knows no stream."""

from collections.abc import Awaitable, Callable

Tell = Callable[[bool], Awaitable[None]]


class PartHealth:
    """Listeners hear of a change only: when the first stream gets into trouble, and when the last one is out of it."""

    def __init__(self) -> None:
        self._troubled: set[str] = set()
        self._listeners: list[Tell] = []

    def report_to(self, tell: Tell) -> None:
        self._listeners.append(tell)

    async def note(self, stream: str, *, troubled: bool) -> None:
        was_well = not self._troubled
        (self._troubled.add if troubled else self._troubled.discard)(stream)
        if was_well != (not self._troubled):
            for tell in self._listeners:
                await tell(not self._troubled)
