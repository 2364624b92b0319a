"""Not pure: database. Which rows of the gateway go when; the bytes of files are the artifact collector's."""

from chassis.retention import RetentionRule
from services.gateway.config import GatewaySettings
from services.gateway.files.store import FileStore
from services.gateway.requests.store import RequestStore


def retention_rules(settings: GatewaySettings) -> list[RetentionRule]:
    return [
        RetentionRule(
            name="idempotency",
            delete=lambda connection, batch_max: RequestStore(connection).prune(
                settings.idempotency_retention_s, batch_max
            ),
        ),
        RetentionRule(
            name="audit_log",
            delete=lambda connection, batch_max: RequestStore(connection).prune_audit_log(
                settings.audit_retention_s, batch_max
            ),
        ),
        RetentionRule(
            name="files",
            delete=lambda connection, batch_max: FileStore(connection).prune(
                settings.deleted_file_record_retention_s, batch_max
            ),
        ),
    ]
