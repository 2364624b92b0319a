"""Ids that follow from the work itself: the same work has the same id, whoever books it and however often."""

import uuid

# Any fixed value serves: it only keeps our ids apart from ids that others derive from the same words.
_NAMESPACE = uuid.UUID("2b9c1d0e-5c43-4f0a-8a52-6a7d1c0f9e31")


def transaction_id(kind: str, *work: str) -> uuid.UUID:
    """The same work has the same id, whoever books it and however often."""
    return uuid.uuid5(_NAMESPACE, "\0".join((kind, *work)))


def hold_id(resource: str) -> str:
    return f"hold_{uuid.uuid5(_NAMESPACE, resource).hex}"


def usage_record_id(project_id: str, work_key: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, f"usage\0{project_id}\0{work_key}")
