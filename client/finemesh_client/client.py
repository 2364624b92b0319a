"""The client: one object with a part per area of the API. It knows no transport detail."""

from __future__ import annotations

from types import TracebackType

from finemesh_client.access import Identity
from finemesh_client.billing import Billing
from finemesh_client.budgets import Budgets
from finemesh_client.chat import Chat
from finemesh_client.config import ClientConfig, find_config
from finemesh_client.endpoints import Endpoints
from finemesh_client.files import Files
from finemesh_client.invoices import Invoices
from finemesh_client.jobs import Jobs
from finemesh_client.ledger import Ledger
from finemesh_client.models import Models
from finemesh_client.transport import Transport


class Client:
    """`async with Client() as mesh: job = await mesh.jobs.create(...)`.

    Without a config it looks in the environment and for a running local stack. Every method raises a subclass of
    finemesh_client.FinemeshError.
    """

    def __init__(self, config: ClientConfig | None = None) -> None:
        self.config = config or find_config()
        self._transport = Transport(self.config)
        self.files = Files(self._transport)
        self.jobs = Jobs(self._transport)
        self.models = Models(self._transport)
        self.endpoints = Endpoints(self._transport)
        self.chat = Chat(self._transport)
        self.billing = Billing(self._transport)
        self.budgets = Budgets(self._transport)
        self.invoices = Invoices(self._transport)
        self.ledger = Ledger(self._transport)
        self.identity = Identity(self._transport)

    async def close(self) -> None:
        """Closes the connection."""
        await self._transport.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
