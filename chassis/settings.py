"""The settings that every daemon shares, read from the environment once, into one frozen object.

A service subclasses `ChassisSettings` in its own `config.py`; this file knows no service by name.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

ENV_ROOT = "FINEMESH_"


class ChassisSettings(BaseSettings):
    """`FINEMESH_<SERVICE>_<NAME>` wins over the shared `FINEMESH_<NAME>`, which wins over the default.

    A subclass gives `service_name` a default; the prefix follows from it.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", validate_default=True, env_ignore_empty=True)

    # These describe one process; a shared variable must not give them to every service of a host.
    own_names: ClassVar[frozenset[str]] = frozenset(
        {"service_name", "listen_address", "advertised_address", "port_file"}
    )

    service_name: str = Field(default="", pattern=r"^[a-z][a-z0-9-]{0,62}$", description="Name on the certificate.")
    listen_address: str = Field(default="127.0.0.1:0", description="host:port of the mesh server; port 0 picks one.")
    advertised_address: str = Field(
        default="", description="host:port by which others reach the mesh server; empty: the bound one."
    )
    port_file: Path | None = Field(default=None, description="Where the bound port is written after the start.")

    tls_dir: Path = Field(default=Path("tls"), description="Folder of ca.pem, <service>.pem and <service>.key.")
    public_certificate_file: Path | None = Field(default=None, description="Certificate chain of a public server.")
    public_key_file: Path | None = Field(default=None, description="Private key of a public server's certificate.")

    database_url: str = Field(default="", repr=False, description="postgresql:// address; empty: keeps no tables.")
    nats_url: str = Field(default="nats://127.0.0.1:4222", repr=False, description="Address of the event bus.")
    otlp_endpoint: str | None = Field(default=None, description="OTLP gRPC endpoint; none: nothing is exported.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    drain_grace_s: float = Field(default=10.0, gt=0, le=600, description="Longest time of one drain stage.")
    default_deadline_s: float = Field(default=30.0, gt=0, description="Deadline of a unary call that brings none.")
    stream_deadline_s: float = Field(default=6 * 3600.0, gt=0, description="Deadline of a stream that brings none.")
    deadline_shave_s: float = Field(default=0.05, ge=0, description="What each hop keeps back to report in time.")
    deadline_min_s: float = Field(default=0.01, ge=0, description="Less remaining time than this is refused.")

    message_size_bytes_max: int = Field(default=4 * 1024 * 1024, ge=1024, description="Largest gRPC message.")
    metadata_size_bytes_max: int = Field(default=16 * 1024, ge=8192, description="Largest gRPC metadata block.")
    concurrent_calls_max: int = Field(
        default=1000, ge=1, description="Calls in flight on one server at a time, without streams."
    )
    calls_per_caller_max: int = Field(default=500, ge=1, description="Of them, those of one user's key.")
    streams_max: int = Field(default=2000, ge=1, description="Streams open on one server at a time.")
    streams_per_caller_max: int = Field(default=500, ge=1, description="Of them, those of one user's key.")
    request_s_max: float = Field(
        default=30.0, gt=0, le=600, description="How long the request of a call may take to arrive."
    )
    stalled_reader_s_max: float = Field(
        default=30.0, gt=0, description="A client that takes nothing of its answer for longer is cut off."
    )
    # Health and reflection are open to anybody, so the limits of callers do not bound them.
    open_calls_max: int = Field(
        default=1000, ge=1, description="Calls of health and reflection at a time; the oldest gives way to the next."
    )
    open_calls_per_connection_max: int = Field(default=100, ge=1, description="Of them, those of one connection.")
    open_call_s_max: float = Field(default=600.0, gt=0, description="Longest stream of health or reflection.")
    # What one connection may open on a public server; in the mesh one connection carries the calls of all users.
    connection_calls_max: int = Field(
        default=1000,
        ge=1,
        description="Calls open on one connection to a public server; the client keeps more waiting.",
    )
    connections_max: int = Field(
        default=4000, ge=1, description="Connections to one gRPC server at a time; more are closed at once."
    )
    waiting_calls_max: int = Field(
        default=10_000,
        ge=1,
        description="Calls that reached a server before it looked at them; gRPC ends more of them as CANCELLED.",
    )
    connection_idle_s_max: float = Field(
        default=300.0, gt=0, description="A public server closes a connection without calls after it."
    )
    handshake_s_max: float = Field(
        default=10.0, gt=0, description="How long a new connection may take for TLS and its first frames."
    )
    page_token_key: str = Field(
        default="",
        repr=False,
        pattern=r"^(.{32,512})?$",
        description="Random text that page tokens are signed with, the same for all replicas of a service; empty: one "
        "of the process's own, so that a list begins anew when the process does.",
    )
    reconnect_backoff_s_min: float = Field(default=0.05, gt=0, description="First pause before a new connection.")
    reconnect_backoff_s_max: float = Field(default=1.0, gt=0, description="Longest pause before a new connection.")
    keepalive_s: float = Field(default=5.0, gt=0, description="Ping interval that finds a vanished or frozen peer.")
    keepalive_timeout_s: float = Field(
        default=10.0, gt=0, description="A peer that does not answer a ping for longer is left."
    )

    pool_size_min: int = Field(default=1, ge=0, description="Database connections that are kept open.")
    pool_size_max: int = Field(default=10, ge=1, description="Database connections of one process at most.")
    pool_wait_s_max: float = Field(default=5.0, gt=0, description="Longest wait for a free database connection.")
    connect_timeout_s: float = Field(default=5.0, gt=0, description="Longest attempt to reach database or bus.")
    startup_wait_s: float = Field(default=60.0, gt=0, description="How long a start waits for database and bus.")
    statement_timeout_s: float = Field(default=30.0, gt=0, description="Longest database statement.")
    transaction_idle_s_max: float = Field(
        default=30.0, gt=0, description="A transaction in which its process does nothing for longer is rolled back."
    )
    transaction_s_max: float = Field(
        default=60.0,
        gt=0,
        description="A transaction that is open for longer is rolled back, whatever its process does; more than "
        "statement_timeout_s and transaction_idle_s_max. Migrations and verifications are exempt.",
    )

    outbox_batch_max: int = Field(default=200, ge=1, description="Outbox rows that one claim takes.")
    outbox_poll_s: float = Field(default=0.5, gt=0, description="Pause between claims when nothing wakes the relay.")
    outbox_lease_s: float = Field(default=10.0, gt=0, description="How long a claimed outbox row stays claimed.")
    outbox_look_back_s: float = Field(
        default=60.0, gt=0, description="How far back a relay looks for events that became visible late."
    )
    outbox_look_whole_s: float = Field(default=30.0, gt=0, description="Pause between looks at the whole outbox.")
    outbox_retention_s: float = Field(default=7 * 86400.0, gt=0, description="How long published events are kept.")
    # Longer than the stream's and the outbox's together: an event must not outlive the memory that it was handled.
    inbox_retention_s: float = Field(default=30 * 86400.0, gt=0, description="How long handled event ids are kept.")
    prune_interval_s: float = Field(default=60.0, gt=0, description="Pause between deletions of what is past keeping.")
    prune_batch_max: int = Field(default=5000, ge=1, description="Rows that one deletion takes.")

    event_size_bytes_max: int = Field(default=768 * 1024, ge=1024, description="Largest event; NATS takes 1 MiB.")
    publish_timeout_s: float = Field(default=5.0, gt=0, description="How long a publish waits to be acknowledged.")
    publish_alarm_s: float = Field(
        default=15.0, gt=0, description="After so long without a publish that worked health says that the bus is ill."
    )
    stream_age_s_max: float = Field(default=21 * 86400.0, gt=0, description="Events leave a stream after it.")
    stream_size_bytes_max: int = Field(default=1024**3, ge=1024**2, description="Size at which a stream is full.")
    stream_replicas: int = Field(default=1, ge=1, le=5, description="Servers of a NATS cluster that keep a stream.")
    stream_alarm_share: float = Field(
        default=0.7, gt=0, le=1, description="Part of that size from which on an error is logged."
    )
    stream_look_interval_s: float = Field(
        default=30.0, gt=0, description="Pause between looks at streams: deletes what is handled, finds what is lost."
    )
    consumer_batch_max: int = Field(default=64, ge=1, description="Events fetched from the bus at a time.")
    consumer_fetch_wait_s: float = Field(default=2.0, gt=0, description="How long one fetch waits for events.")
    consumer_concurrency_max: int = Field(default=4, ge=1, description="Events one consumer handles at the same time.")
    consumer_failures_max: int = Field(default=10, ge=1, description="Handler failures before an event is set aside.")
    consumer_ack_wait_s: float = Field(default=15.0, gt=0, description="Unacknowledged events come again after it.")
    consumer_drain_wait_s: float = Field(default=2.0, ge=0, description="How long a reader may take to catch up.")
    consumer_backoff_s_min: float = Field(default=0.2, gt=0, description="Shortest pause before a redelivery.")
    consumer_backoff_s_max: float = Field(default=30.0, gt=0, description="Longest pause before a redelivery.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        service = init_settings().get("service_name") or settings_cls.model_fields["service_name"].default
        own_prefix = f"{ENV_ROOT}{service.upper().replace('-', '_')}_"
        own = EnvSettingsSource(settings_cls, env_prefix=own_prefix)
        return init_settings, own, _SharedSource(settings_cls, env_prefix=ENV_ROOT)


class _SharedSource(EnvSettingsSource):
    """The `FINEMESH_<NAME>` variables, less the names that belong to one process."""

    def __call__(self) -> dict[str, object]:
        own_names: frozenset[str] = getattr(self.settings_cls, "own_names", frozenset())
        return {name: value for name, value in super().__call__().items() if name not in own_names}
