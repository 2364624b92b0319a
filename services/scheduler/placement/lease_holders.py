"""Not pure: database. Whether a call comes from the node that it speaks for: the name in its certificate is the node's.

It decides nothing about leases: an old token of the caller's own node passes.
"""

from collections import OrderedDict

from chassis.errors import PermissionDenied
from chassis.identity import current_caller
from services.scheduler.database import Database
from services.scheduler.placement.store import AllocationStore

# A token's node never changes.
TOKENS_REMEMBERED_MAX = 10_000


def require_node(node: str) -> None:
    """PermissionDenied unless the call being served comes from this node."""
    caller = current_caller()
    certified = caller.instance
    if certified != node:
        owner = f"node {certified}" if certified else "no node"
        raise PermissionDenied(
            "NODE_NOT_CERTIFIED",
            f"the certificate of this call is that of {owner} and does not speak for node {node}; who does "
            f"needs the certificate {caller.service}@{node}",
            metadata={"node": node, "certified": certified},
        )


class LeaseHolders:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._nodes: OrderedDict[int, str] = OrderedDict()

    async def require(self, lease_token: int) -> None:
        """PermissionDenied for a lease that was given to another node; one that was never given is nobody's."""
        node = self._nodes.get(lease_token)
        if node is None:
            node = await AllocationStore(self._database.pool).node_of(lease_token)
            if node is None:
                return
            self._nodes[lease_token] = node
            if len(self._nodes) > TOKENS_REMEMBERED_MAX:
                self._nodes.popitem(last=False)
        certified = current_caller().instance
        if certified != node:
            # Whose lease it is says nothing to others.
            raise PermissionDenied(
                "NODE_NOT_CERTIFIED",
                f"lease {lease_token} was not given to the node that the certificate of this call names",
                metadata={"lease_token": str(lease_token), "certified": certified},
            )
