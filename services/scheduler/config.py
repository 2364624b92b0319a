"""The scheduler's settings, read from the environment once. Every limit of the service is named here."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from chassis.settings import ChassisSettings


class SchedulerSettings(ChassisSettings):
    """`FINEMESH_SCHEDULER_<NAME>` or the shared `FINEMESH_<NAME>`."""

    own_names: ClassVar[frozenset[str]] = ChassisSettings.own_names | {"agents_address", "agents_port_file"}

    service_name: str = "scheduler"
    agents_address: str = Field(
        default="127.0.0.1:0", description="host:port of the server for agents and for devices that serve."
    )
    agents_port_file: Path | None = Field(default=None, description="Where the bound port for agents is written.")
    agents_pool_size_max: int = Field(
        default=10, ge=2, description="Database connections for what keeps leases, besides those for users' calls."
    )
    transaction_idle_s_max: float = Field(
        default=3.0,
        gt=0,
        description="As of the chassis, below a third of a lease: a frozen replica holds up the others no longer.",
    )

    gateway_address: str = Field(default="127.0.0.1:7100", description="host:port of the gateways' mesh servers.")
    billing_address: str = Field(default="127.0.0.1:7102", description="host:port of billing's replicas.")
    inference_address: str = Field(default="127.0.0.1:7103", description="host:port of inference's replicas.")

    heartbeat_interval_s: float = Field(default=1.0, gt=0, le=60, description="How often a node says that it lives.")
    lease_duration_s: float = Field(default=10.0, gt=0, le=3600, description="How long a lease lives unrenewed.")
    sweep_interval_s: float = Field(default=0.5, gt=0, description="Pause between looks for ended leases.")
    clock_jump_s_max: float = Field(
        default=2.0,
        gt=0,
        description="The database's clock was set when it goes wrong by more between two sweeps.",
    )
    node_memory_s: float = Field(default=3600.0, gt=0, description="A node that is away longer counts for no job.")
    node_devices_max: int = Field(default=64, ge=1, description="Devices of one node.")
    nodes_max: int = Field(
        default=1000, ge=1, description="Nodes that get jobs; one more is refused when it registers."
    )

    secrets_key: str = Field(
        default="",
        repr=False,
        description="Random text that the secrets of jobs are sealed with; empty: jobs that bring some are refused.",
    )
    wandb_urls: str = Field(
        default="https://api.wandb.ai",
        min_length=1,
        description="Weights & Biases servers that jobs may name, with commas between; the first is the default.",
    )
    wandb_offline: bool = Field(default=False, description="The nodes keep such runs as files; no key is needed.")

    attempt_progress_s_max: float = Field(
        default=6 * 3600.0, gt=0, description="The lease of an attempt that finished no step for longer is not renewed."
    )
    quarantine_window_s: float = Field(
        default=600.0, gt=0, description="Attempts that ended within it are counted against their node."
    )
    quarantine_jobs_min: int = Field(
        default=3, ge=1, description="Different jobs that fail on a node before it is put into quarantine."
    )
    quarantine_share_min: float = Field(
        default=0.5, gt=0, le=1, description="Part of the attempts on a node that fails before it is put there."
    )
    quarantine_duration_s: float = Field(
        default=900.0, gt=0, description="How long a node in quarantine gets no job; then it is tried again."
    )
    attempts_max: int = Field(default=10, ge=1, description="Failures in a row without a new checkpoint in between.")
    disk_full_attempts_max: int = Field(
        default=1000,
        ge=1,
        description="The same when the last of them met a full disk, which a person frees: a minute each.",
    )
    checkpoints_kept_max: int = Field(default=3, ge=1, description="Newest checkpoints of a job that are kept.")
    obsolete_batch_max: int = Field(default=8, ge=1, description="Checkpoints that one commit tells to delete.")
    report_metrics_max: int = Field(default=1000, ge=1, description="Metrics and usage records in one report.")

    validations_concurrent_max: int = Field(
        default=32, ge=2, description="Jobs that one replica takes through validation at the same time."
    )
    large_validations_concurrent_max: int = Field(
        default=16, ge=1, description="Of these, jobs with large datasets, at most all but one."
    )
    validations_per_organization_max: int = Field(
        default=8,
        ge=1,
        description="Of all replicas: jobs of one organization at the same time; half of them may be large.",
    )
    large_dataset_bytes_min: int = Field(
        default=16 * 1024**2,
        ge=1,
        description="From this size on a job's files are large: their analysis takes minutes.",
    )
    quotes_per_key_max: int = Field(
        default=20,
        ge=1,
        description="Of all replicas: quotes and previews of one API key that wait for their analysis or are analysed.",
    )
    quote_place_s: float = Field(
        default=30.0, gt=0, description="So long after a replica died, the places of its quotes are free again."
    )
    metric_retention_s: float = Field(
        default=90 * 86_400.0, gt=0, description="A job's metric lines are deleted that long after its end."
    )
    job_detail_retention_s: float = Field(
        default=2 * 365 * 86_400.0,
        gt=0,
        description="All but a job's row, its transitions and its kept checkpoints is deleted that long after its end.",
    )
    run_state_retention_s: float = Field(
        default=86_400.0,
        gt=0,
        description="So long after the end of a job its optimizer states, and what its attempts left in the artifact "
        "store, are deleted; longer than a trainer's report_patience_s.",
    )
    checkpoint_retention_s: float = Field(
        default=30 * 86_400.0,
        gt=0,
        description="Checkpoints that nobody asked to keep are deleted that long after the end of their job.",
    )
    deleted_model_retention_s: float = Field(
        default=7 * 86_400.0,
        gt=0,
        description="The files of a model stay that long after its owner deleted it, and until jobs that start from it "
        "have ended.",
    )
    folder_claim_s: float = Field(
        default=600.0, gt=0, description="How long a node may clean folders of jobs before others take them over."
    )
    folders_batch_max: int = Field(default=10, ge=1, description="Folders of jobs that a node takes at a time.")
    history_interval_s: float = Field(default=60.0, gt=0, description="Pause between looks for such jobs.")
    history_batch_max: int = Field(default=5000, ge=1, description="Lines that one deletion takes.")
    allocation_retention_s: float = Field(
        default=30 * 86_400.0, gt=0, description="How long the leases of endpoints are kept after their end."
    )
    node_retention_s: float = Field(
        default=30 * 86_400.0, gt=0, description="A node that is lost for longer is forgotten with its devices."
    )
    analysis_retention_s: float = Field(
        default=180 * 86_400.0, gt=0, description="How long the counts of a dataset are kept; then they are made again."
    )
    validation_defects_max: int = Field(
        default=5, ge=1, description="Unexpected errors of one job's validation before it is set aside as failed."
    )
    placement_defects_max: int = Field(
        default=10,
        ge=1,
        description="Unexpected errors of one job's placement, with pauses that grow to minutes, before it fails.",
    )
    claim_duration_s: float = Field(
        default=10.0, gt=0, description="How long a worker's claim on a job lives unrenewed."
    )
    analysis_deadline_s: float = Field(
        default=4 * 3600.0,
        gt=0,
        description="Longest wait for the analysis of one file, in line and running; more than the trainers' "
        "analysis_s_max. A caller's own deadline may be shorter.",
    )
    description_deadline_s: float = Field(
        default=10.0, gt=0, description="Longest look at a model's chat template, by all trainers that are asked."
    )
    description_retry_s: float = Field(
        default=30.0, ge=0, description="A chat template that no trainer described is not asked for again before."
    )
    peer_deadline_s: float = Field(default=5.0, gt=0, description="Longest call to billing by a worker.")
    hold_renewal_interval_s: float = Field(
        default=21_600.0,
        gt=0,
        description="Pause between renewals of holds; a quarter of billing's hold_ttl_s is well.",
    )
    hold_renewal_batch_max: int = Field(default=1000, ge=1, le=1000, description="Jobs in one renewal of holds.")
    analyzers_max: int = Field(default=64, ge=1, description="Channels to trainers that are kept open.")

    pipeline_poll_s: float = Field(default=1.0, gt=0, description="Pause of a worker that nothing wakes.")
    placements_batch_max: int = Field(default=500, ge=1, description="Queued jobs that the policy reads at a time.")
    placements_seen_max: int = Field(
        default=20_000,
        ge=1,
        description="Queued jobs that one round of the policy sees; where more have to be seen, the log says so.",
    )
    watch_poll_s: float = Field(
        default=2.0, gt=0, description="Pause between looks for changes of watched jobs that nobody told of."
    )
    watch_reads_concurrent_max: int = Field(
        default=4, ge=1, description="Reads for watchers at the same time; fewer than the pool has connections."
    )
    queue_snapshot_s: float = Field(
        default=1.0, ge=0, description="A queued job's place and what it waits for are at most that old."
    )
    watch_batch_max: int = Field(default=200, ge=1, description="Events in one message of a watch.")

    @property
    def report_entries_max(self) -> int:
        """Metrics, usage records and warnings of one report, together."""
        return 3 * self.report_metrics_max

    @property
    def wandb_urls_allowed(self) -> tuple[str, ...]:
        return tuple(url.strip().rstrip("/") for url in self.wandb_urls.split(","))
