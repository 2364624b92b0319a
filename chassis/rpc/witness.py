"""Who sees a call beside its handler: what was asked for before it is done, and what came of it. It keeps nothing."""

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeAlias

# What a call that was answered came to; others came to the reason of their error.
OK = "OK"


class Witness(Protocol):
    """Sees one call of a caller who is known."""

    async def asked(self, content: bytes) -> None:
        """The first message as it came, before the handler sees it; what this raises refuses the call."""

    async def ended(self, outcome: str, response: Any = None) -> None:
        """Raises nothing. The first outcome counts: an answered call can still fail on its way to the caller."""


# For a method by its full name: what makes the witness of each of its calls, or None where nobody looks.
Witnessing: TypeAlias = Callable[[str], Callable[[], Witness] | None]


async def witnessed(witness: Witness, contents: Any) -> AsyncIterator[bytes]:
    """The messages of a stream, whose first one is shown to the witness."""
    first = True
    async for content in contents:
        if first:
            await witness.asked(content)
            first = False
        yield content
