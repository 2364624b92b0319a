"""The agent's settings: who this node is, where it keeps its files, and every limit of its work.

It opens nothing: paths and addresses become files and channels in main.py.
"""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from chassis.settings import ChassisSettings


class TrainerSettings(ChassisSettings):
    """Read from `FINEMESH_TRAINER_<NAME>`, then from `FINEMESH_<NAME>` where a value may be shared."""

    own_names: ClassVar[frozenset[str]] = ChassisSettings.own_names | {"node_name"}

    service_name: str = "trainer"
    node_name: str = Field(default="local-0", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Stable node name.")
    scheduler_agents_address: str = Field(
        default="127.0.0.1:7105",
        min_length=1,
        description="host:port of the scheduler's server for agents, or of several replicas with commas between.",
    )
    scheduler_silence_s_min: float = Field(
        default=2.0,
        gt=0,
        description="A silent scheduler is left for another replica after a third of a lease or this.",
    )

    artifacts_url: str = Field(
        default="file:///var/lib/finemesh/artifacts",
        description="Root of the artifact store, such as file:///... or s3://...",
    )
    data_dir: Path = Field(default=Path("data"), description="What this machine keeps; shared by its agents.")
    work_dir: Path | None = Field(default=None, description="Folders of running attempts; none: under data_dir.")
    cache_dir: Path | None = Field(default=None, description="Downloaded files by digest; none: under data_dir.")
    cache_size_bytes_max: int = Field(default=200 * 1024**3, ge=1024**2, description="Least used files go above it.")
    prepared_size_bytes_max: int = Field(
        default=50 * 1024**3,
        ge=0,
        description="Tokenised and packed files, kept for the next; least used ones go above it.",
    )
    transfer_chunk_bytes: int = Field(default=4 * 1024**2, ge=64 * 1024, description="Bytes in memory per chunk.")
    transfers_concurrent_max: int = Field(default=4, ge=1, description="Files of one artifact in flight.")
    transfer_attempts_max: int = Field(default=5, ge=1, description="Tries of one file while the store is away.")

    cpu_devices: int = Field(default=1, ge=1, le=64, description="Devices of a node without a GPU: its equal parts.")
    threads_per_child: int = Field(default=2, ge=1, le=256, description="CPU threads of each process of a child.")
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=64,
        description="Tokens in one forward pass of a child; none: what the kind of device is best at.",
    )
    parity_command: str = Field(
        default="auto",
        description="Program that scores an export with the serving engine before a job succeeds, such as "
        "'python -m services.inference.engines.score'; auto: that one on a GPU where vLLM is installed; empty: plain "
        "transformers and peft alone.",
    )
    child_module: str = Field(default="services.trainer.train.main", description="What a training child runs.")
    child_line_bytes_max: int = Field(default=4 * 1024**2, ge=4096, description="Longest event line of a child.")
    child_ending_s_max: float = Field(
        default=30.0, gt=0, description="A child that is killed is dead by then, or its device is set aside."
    )
    child_silence_s_max: float = Field(default=3600.0, gt=0, description="A child without an event is hung after it.")
    warm_memory_bytes_max: int = Field(
        default=4 * 1024**3, ge=0, description="What children waiting with loaded libraries may hold; 0: none waits."
    )
    warm_start_s_max: float = Field(
        default=120.0, gt=0, description="A waiting child has its libraries loaded by then."
    )
    cancel_grace_s: float = Field(default=120.0, gt=0, description="Time for the step at hand after a cancellation.")

    wandb_offline: bool = Field(
        default=False, description="Keep the curves as files under data_dir/wandb, for `wandb sync`, and send none."
    )
    wandb_init_s_max: float = Field(default=90.0, gt=0, description="Longest wait for the server to open a run.")
    wandb_finish_s_max: float = Field(default=20.0, ge=0, description="Longest wait for the last points of a run.")
    wandb_points_max: int = Field(default=10_000, ge=1, description="Points kept while the server does not take them.")
    hub_endpoint: str = Field(
        default="https://huggingface.co", description="The hub that models are pushed to and read from."
    )
    hub_pull_s_max: float = Field(
        default=3600.0, gt=0, description="Longest read of what a run starts from, all tries."
    )
    hub_pull_attempts_max: int = Field(default=4, ge=1, description="Tries of one read while the hub is away.")
    hub_push_s_max: float = Field(default=1800.0, gt=0, description="Longest push of one model, all tries together.")
    hub_push_attempts_max: int = Field(default=4, ge=1, description="Tries of one push while the hub is away.")

    folder_interval_s: float = Field(
        default=60.0, gt=0, description="Pause between questions for folders of ended jobs that are to be cleaned."
    )

    report_interval_s: float = Field(default=0.5, ge=0, description="Progress is collected this long per report.")
    report_metrics_max: int = Field(default=500, ge=1, description="Steps in one request that reports progress.")
    report_queue_max: int = Field(default=1000, ge=1, description="Reports kept while the scheduler is away.")
    report_timeout_s: float = Field(default=10.0, gt=0, description="Deadline of one report.")
    report_patience_s: float = Field(default=3600.0, gt=0, description="A report is given up after it.")
    report_backoff_s_min: float = Field(default=0.1, gt=0, description="First pause before a report is repeated.")
    report_backoff_s_max: float = Field(default=5.0, gt=0, description="Longest pause before a report is repeated.")

    analysis_module: str = Field(default="services.trainer.train.analysis.main", description="What an analysis runs.")
    analysis_s_max: float = Field(default=3600.0, gt=0, description="Longest analysis of one dataset.")
    description_s_max: float = Field(
        default=120.0, gt=0, description="Longest description of what a model's chat template can render."
    )
    analysis_memory_bytes_max: int = Field(
        default=8 * 1024**3, ge=256 * 1024**2, description="What its processes hold, each."
    )
    analysis_answer_bytes_max: int = Field(default=4 * 1024**2, ge=4096, description="Longest answer of an analysis.")
    analysis_errors_max: int = Field(default=100, ge=1, description="Faulty lines that one answer names.")
    analyses_concurrent_max: int = Field(
        default=4,
        ge=2,
        description="Analyses at the same time on this node; one organization gets all places but one.",
    )
    large_analyses_concurrent_max: int = Field(
        default=2, ge=1, description="Places of these for large datasets, at most all but one."
    )
    large_analysis_bytes_min: int = Field(
        default=16 * 1024**2, ge=1, description="From so much work on a dataset is large: its analysis takes minutes."
    )
    quote_analyses_per_key_max: int = Field(
        default=1, ge=1, description="Quotes and previews of one API key that are worked on at the same time."
    )
    analyses_waiting_max: int = Field(
        default=1000, ge=1, description="Analyses in line on this node; the scheduler asks another one then."
    )
    descriptions_concurrent_max: int = Field(
        default=2, ge=1, description="Descriptions of models at the same time on this node."
    )
    analyses_remembered_max: int = Field(default=256, ge=1, description="Answers kept in memory.")

    @property
    def attempts_root(self) -> Path:
        return self.work_dir or self.data_dir / "trainer"

    @property
    def cache_root(self) -> Path:
        return self.cache_dir or self.data_dir / "cache" / "artifacts"

    @property
    def prepared_root(self) -> Path:
        return self.cache_root / "prepared"
