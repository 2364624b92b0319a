"""Machines by the clock over the real bus: minutes of an endpoint and hours of a cluster become usage that is owed."""

from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.billing.v1 import usage_record_pb2
from finemesh.events.v1 import usage_events_pb2
from tests.contract.billing.conftest import Customer, Mesh


def now() -> Timestamp:
    value = Timestamp()
    value.FromDatetime(datetime.now(UTC))
    return value


async def test_hours_and_minutes_come_once_and_are_owed(customer: Customer, mesh: Mesh) -> None:
    owner: dict[str, Any] = {"project_id": customer.project, "organization_id": customer.organization}
    hour = usage_events_pb2.ClusterHourRecorded(
        work_key="cl_1:1:0",
        cluster=f"projects/{customer.project}/clusters/cl_1",
        hardware_type="nvidia-h200-141gb",
        node_count=2,
        usage_time=now(),
        **owner,
    )
    minute = usage_events_pb2.EndpointMinuteRecorded(
        work_key="ep_1:1:0",
        endpoint=f"projects/{customer.project}/endpoints/ep_1",
        hardware_type="nvidia-l40s-48gb",
        device_count=4,
        usage_time=now(),
        **owner,
    )
    # The same hour under two event ids: the key of the work decides.
    for message in (hour, hour, minute):
        await mesh.publish(message)
    booked = "SELECT count(*) FROM usage_records WHERE organization_id = $1"
    await mesh.until(booked, 2, customer.organization)
    with customer.calling():
        listed = await mesh.billing.ListUsageRecords(pb.ListUsageRecordsRequest())
        balance = (await mesh.billing.GetBalance(pb.GetBalanceRequest())).balance
    records = {record.kind: record for record in listed.usage_records}
    nodes = records[usage_record_pb2.USAGE_KIND_CLUSTER_HOURS]
    assert (nodes.quantity, nodes.model, nodes.resource) == (2, "nvidia-h200-141gb", hour.cluster)
    assert nodes.amount_nanos_usd == 2 * 39_920_000_000
    devices = records[usage_record_pb2.USAGE_KIND_ENDPOINT_MINUTES]
    assert (devices.quantity, devices.model) == (4, "nvidia-l40s-48gb")
    assert devices.amount_nanos_usd == 4 * 24_833_333
    assert balance.owed_nanos_usd == nodes.amount_nanos_usd + devices.amount_nanos_usd
