"""The gateway's settings: every limit of the public edge has its name here. Read once, at the start."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from chassis.settings import ChassisSettings

MIGRATIONS = Path(__file__).parent / "migrations"
MIB = 1024 * 1024


class GatewaySettings(ChassisSettings):
    """`listen_address` is the mesh's door (mTLS); the public doors are `public_address` (gRPC) and `http_address`."""

    own_names: ClassVar[frozenset[str]] = ChassisSettings.own_names | {
        "public_address",
        "public_port_file",
        "http_address",
        "http_port_file",
    }

    service_name: str = "gateway"
    public_address: str = Field(default="127.0.0.1:0", description="host:port of the public gRPC API.")
    public_port_file: Path | None = Field(default=None, description="Where the bound public gRPC port is written.")
    http_address: str = Field(default="127.0.0.1:0", description="host:port of the HTTP edge.")
    http_port_file: Path | None = Field(default=None, description="Where the bound HTTP port is written.")

    scheduler_address: str = Field(default="127.0.0.1:7101", description="host:port of the scheduler's replicas.")
    billing_address: str = Field(default="127.0.0.1:7102", description="host:port of billing's replicas.")
    inference_address: str = Field(default="127.0.0.1:7103", description="host:port of inference's replicas.")
    artifacts_url: str = Field(default="file:///var/lib/finemesh/artifacts", description="Root of the artifact store.")

    key_cache_s: float = Field(default=2.0, ge=0, description="A key revoked elsewhere still works this long here.")
    key_lookups_max: int = Field(
        default=1000,
        ge=1,
        description="Calls that wait at a time to hear whether a key exists that was not used lately.",
    )
    key_cache_size_max: int = Field(default=10_000, ge=1, description="Keys remembered at a time.")
    stream_key_check_s: float = Field(
        default=2.0, gt=0, description="Pause between looks whether the keys of open streams are still valid."
    )
    rate_calls_per_s: float = Field(default=2000.0, gt=0, description="Calls per second of one key, on average.")
    rate_burst_max: int = Field(default=4000, ge=1, description="Calls of one key at once.")
    rate_keys_max: int = Field(default=10_000, ge=1, description="Keys whose calls are counted at a time.")

    projects_max: int = Field(default=1000, ge=1, description="Projects of one organization.")
    keys_per_project_max: int = Field(default=1000, ge=1, description="Valid keys of one project.")
    namespace_poll_s: float = Field(
        default=30.0, gt=0, description="Pause between looks for projects whose slug inference was not told."
    )
    namespace_batch_max: int = Field(default=100, ge=1, description="Slugs that one such look tells.")
    audit_retention_s: float = Field(
        default=2 * 365 * 86400.0, gt=0, description="How long the audit log says who did what."
    )
    idempotency_retention_s: float = Field(default=7 * 86400.0, gt=0, description="How long request_ids are known.")

    file_size_bytes_max: int = Field(default=10 * 1024 * MIB, ge=1, description="Largest uploaded file.")
    chunk_bytes_max: int = Field(default=MIB, ge=1024, description="Largest chunk of an upload or a download.")
    uploads_max: int = Field(default=16, ge=1, description="Uploads in flight at a time; each holds parts in memory.")
    uploads_per_organization_max: int = Field(default=8, ge=1, description="Of them, those of one organization.")
    uploads_per_key_max: int = Field(default=4, ge=1, description="Of them, those of one API key.")
    upload_part_bytes: int = Field(default=5 * MIB, ge=5 * MIB, description="Part of a multipart upload.")
    upload_parts_in_flight_max: int = Field(default=3, ge=1, description="Parts of one upload written at a time.")
    upload_idle_s_max: float = Field(
        default=60.0, gt=0, description="An upload that is waited for longer without upload_idle_bytes_min ends."
    )
    upload_idle_bytes_min: int = Field(
        default=65536, ge=1, description="Bytes that show that an upload is not idle; empty chunks never do."
    )
    upload_s_max: float = Field(default=3600.0, gt=0, description="Longest upload; the stream ends after it.")
    upload_reserve_bytes: int = Field(
        default=64 * MIB, ge=MIB, description="An upload that does not announce its size reserves this much at a time."
    )
    project_bytes_max: int = Field(
        default=200 * 1024 * MIB, ge=0, description="Stored bytes of a project without a quota of its own."
    )
    project_files_max: int = Field(
        default=10_000, ge=0, le=1_000_000, description="Files of a project without a quota of its own."
    )
    # Long enough for a job that was being created from the file to be known to the scheduler.
    deleted_file_retention_s: float = Field(
        default=300.0, ge=0, description="Bytes outlive their file so long, and as long as a job reads them."
    )
    deleted_file_recheck_s: float = Field(
        default=600.0, gt=0, description="Pause between looks whether jobs still read a deleted file."
    )
    deleted_file_record_retention_s: float = Field(
        default=365 * 86400.0, gt=0, description="The record of a deleted file outlives its bytes so long."
    )
    sweep_interval_s: float = Field(default=30.0, gt=0, description="Pause between removals of bytes nobody needs.")
    sweep_batch_max: int = Field(default=100, ge=1, description="Objects that one sweep removes.")
    sweep_claim_s: float = Field(default=300.0, gt=0, description="An unfinished removal is tried again after it.")

    dataset_line_bytes_max: int = Field(default=4 * MIB, ge=1024, description="Longest line of a dataset.")
    dataset_lines_max: int = Field(default=10_000_000, ge=1, description="Examples of one dataset.")
    dataset_messages_max: int = Field(default=1000, ge=1, description="Messages of one conversation.")
    dataset_errors_max: int = Field(default=100, ge=1, description="Errors of a file that are kept; all are counted.")
    dataset_cells_max: int = Field(
        default=3_000_000_000, ge=1, description="Values of a Parquet file, over all its columns."
    )
    dataset_expanded_bytes_max: int = Field(
        default=32 * 1024 * MIB, ge=1, description="What they take without encoding and compression."
    )
    checks_concurrent_max: int = Field(
        default=2, ge=1, description="Checks of Parquet files at a time; one organization gets all places but one."
    )
    check_inline_bytes_max: int = Field(
        default=65536, ge=0, description="JSONL up to this size is checked without a process of its own."
    )
    check_s_max: float = Field(
        default=600.0, gt=0, description="Longest check of one file, counted from its last byte."
    )
    check_memory_bytes_max: int = Field(
        default=4 * 1024 * MIB, ge=512 * MIB, description="Address space of the process of one check."
    )
    parquet_spool_dir: Path | None = Field(
        default=None, description="Where the bytes of a Parquet upload wait for their check; none: the system's choice."
    )

    http_body_bytes_max: int = Field(default=4 * MIB - 65536, ge=1024, description="Largest body of an HTTP request.")
    http_messages_max: int = Field(default=1000, ge=1, description="Messages of one chat request.")
    http_body_s_max: float = Field(default=30.0, gt=0, description="How long a request's body may take to arrive.")
    http_chat_s_max: float = Field(default=600.0, gt=0, description="Longest generation over HTTP.")
    http_connections_max: int = Field(default=1000, ge=1, description="HTTP requests in flight at a time.")
    http_requests_per_key_max: int = Field(default=500, ge=1, description="Of them, those of one key.")
    http_sockets_max: int = Field(
        default=4000, ge=1, description="HTTP connections at a time; the one that waits longest gives way to the next."
    )
    # None: a proxy in front is one address, and limits those behind it itself.
    http_sockets_per_address_max: int | None = Field(default=None, ge=1, description="Of them, those of one address.")
    http_header_bytes_max: int = Field(default=32 * 1024, ge=1024, description="Largest header of an HTTP request.")
    http_header_fields_max: int = Field(default=100, ge=8, description="Fields of one header and its trailer.")
    http_header_s_max: float = Field(
        default=10.0, gt=0, description="How long a connection may go without a whole header."
    )
