"""Not pure: database. Which rows of inference go when."""

from __future__ import annotations

from chassis.retention import RetentionRule
from services.inference.config import InferenceSettings
from services.inference.endpoints.store import EndpointStore


def retention_rules(settings: InferenceSettings) -> list[RetentionRule]:
    return [
        RetentionRule(
            name="endpoints",
            delete=lambda connection, batch_max: EndpointStore(connection).prune(
                settings.deleted_endpoint_retention_s, batch_max
            ),
        ),
    ]
