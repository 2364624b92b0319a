"""Not pure: database. Which rows of the scheduler go when.

Those of ended jobs are the history keeper's.
"""

from chassis.retention import RetentionRule
from services.scheduler.admission.store import AdmissionStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.nodes.store import NodeStore
from services.scheduler.placement.store import AllocationStore


def retention_rules(settings: SchedulerSettings) -> list[RetentionRule]:
    return [
        RetentionRule(
            name="allocations",
            delete=lambda connection, batch_max: AllocationStore(connection).prune_served(
                settings.allocation_retention_s, batch_max
            ),
        ),
        RetentionRule(
            name="nodes",
            delete=lambda connection, batch_max: NodeStore(connection).prune(settings.node_retention_s, batch_max),
        ),
        RetentionRule(
            name="quote_places",
            delete=lambda connection, batch_max: AdmissionStore(connection).prune_quote_places(batch_max),
        ),
        RetentionRule(
            name="dataset_analyses",
            delete=lambda connection, batch_max: AdmissionStore(connection).prune_counts(
                settings.analysis_retention_s, batch_max
            ),
        ),
    ]
