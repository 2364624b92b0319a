"""The settings of inference: every limit of serving has its name here. Read once, at the start."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from chassis.settings import ChassisSettings
from services.inference.engines.answer_form import NO_PARSERS, AnswerParsers
from services.inference.engines.base import EngineSettings

MIGRATIONS = Path(__file__).parent / "migrations"
MIB = 1024 * 1024
GIB = 1024 * MIB


class InferenceSettings(ChassisSettings):
    """`FINEMESH_INFERENCE_<NAME>` or the shared `FINEMESH_<NAME>`."""

    own_names: ClassVar[frozenset[str]] = ChassisSettings.own_names | {"node_name"}

    service_name: str = "inference"
    node_name: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$",
        description="Node that this process runs on, as its trainer calls it; may be empty where there is only one.",
    )

    scheduler_agents_address: str = Field(
        default="127.0.0.1:7105", description="host:port of the schedulers' servers for devices that serve."
    )
    billing_address: str = Field(default="127.0.0.1:7102", description="host:port of billing's replicas.")
    artifacts_url: str = Field(default="file:///var/lib/finemesh/artifacts", description="Root of the artifact store.")
    data_dir: Path = Field(default=Path("/var/lib/finemesh"), description="Folder for local copies of weights.")

    engine: Literal["vllm", "stub"] = Field(default="vllm", description="What computes the tokens.")
    stub_token_s: float = Field(default=0.0, ge=0, le=10, description="How long the stub takes per token.")
    engines_max: int = Field(default=3, ge=1, description="Engines in memory at a time; the idlest one leaves first.")
    engine_start_s_max: float = Field(default=600.0, gt=0, description="Longest start of an engine.")
    warm_up: bool = Field(default=True, description="Start engine and load adapter as soon as a model is registered.")
    context_tokens_max: int | None = Field(default=None, description="Shorter context than the model declares.")
    sequences_max: int = Field(default=64, ge=1, description="Requests that an engine computes together.")
    queue_requests_max: int = Field(default=256, ge=1, description="Unfinished requests of one engine.")
    kv_cache_bytes: int | None = Field(default=GIB, description="Key-value cache of one engine; none: the GPU's rest.")
    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1, description="Share of a GPU that an engine takes.")
    engine_threads: int | None = Field(default=None, description="CPU threads of one engine; none: all.")
    adapters_resident_max: int = Field(default=16, ge=1, description="Adapters in an engine's memory.")
    adapter_rank_max: int = Field(default=64, ge=1, le=512, description="Largest rank of an adapter.")
    adapter_bytes_max: int = Field(default=8 * GIB, ge=1, description="Largest adapter file.")

    output_tokens_default: int = Field(
        default=512, ge=1, description="Most tokens of an answer that asks for no limit."
    )
    prompt_chars_per_token_max: int = Field(
        default=8,
        ge=1,
        description="Characters of a prompt for each token of the context, checked before it is rendered.",
    )
    prompt_chars_short_max: int = Field(
        default=16_384, ge=0, description="Prompts of more characters are tokenized apart and wait for each other only."
    )
    prompt_workers: int = Field(
        default=2, ge=2, le=64, description="Processes of each engine that run its model's tokenizer and chat template."
    )
    prompt_s_max: float = Field(
        default=5.0, gt=0, description="Longest rendering of a short prompt; then its process is killed and replaced."
    )
    long_prompt_s_max: float = Field(default=60.0, gt=0, description="The same for longer prompts.")
    prompt_memory_bytes_max: int = Field(
        default=GIB, ge=64 * MIB, description="Memory that rendering a prompt may take beside the tokenizer's own."
    )
    answer_part_s_max: float = Field(
        default=2.0, gt=0, description="Longest reading of a part of an answer; then its text is passed on as it is."
    )
    answer_s_max: float = Field(default=20.0, gt=0, description="The same for all parts of an answer together.")
    guide_s_max: float = Field(
        default=10.0, gt=0, description="Longest preparation of tools that must be called, or of a schema to keep."
    )
    messages_max: int = Field(default=1000, ge=1, description="Messages of one chat call.")
    stops_max: int = Field(default=4, ge=1, description="Stop texts of one call.")
    schema_chars_max: int = Field(
        default=65_536, ge=1, description="Characters of the JSON schema that an answer has to keep."
    )

    model_bytes_max: int = Field(default=500 * GIB, ge=1, description="Largest base model.")
    weights_cache_bytes_max: int = Field(
        default=500 * GIB, ge=1, description="Local copies of weights together; the longest unused ones make room."
    )
    model_files_max: int = Field(default=500, ge=1, description="Files of one base model.")
    chunk_bytes_max: int = Field(default=MIB, ge=1024, description="Largest chunk of an import or a download.")
    part_bytes: int = Field(default=8 * MIB, ge=5 * MIB, description="Part of a multipart upload to the store.")
    parts_in_flight_max: int = Field(default=3, ge=1, description="Parts of one upload written at a time.")
    import_store_s_max: float = Field(
        default=6 * 3600.0, gt=0, description="Longest storing of an import's files; what took longer is removed."
    )
    leftover_interval_s: float = Field(
        default=600.0, gt=0, description="Pause between looks for what killed processes left behind."
    )
    leftover_claim_s: float = Field(
        default=300.0, gt=0, description="A removal of such files that was not finished is tried again after it."
    )
    leftovers_batch_max: int = Field(default=20, ge=1, description="Uploads that one such look removes.")
    import_check: Literal["auto", "full", "files"] = Field(
        default="auto",
        description="full: also load each import as an engine does, and run small ones; auto: unless the stub serves.",
    )
    import_check_s_max: float = Field(default=3600.0, gt=0, description="Longest look at the files of an import.")
    import_check_memory_bytes_max: int = Field(
        default=16 * GIB, ge=GIB, description="Memory of the process that looks at the files of an import."
    )
    import_prompts_s_max: float = Field(
        default=60.0, gt=0, description="Longest look at tokenizer and chat template of an import."
    )
    import_run_bytes_max: int = Field(
        default=2 * GIB, ge=0, description="Models with weights of more bytes are not run at their import."
    )
    imports_max: int = Field(default=2, ge=1, description="Imports in flight at a time.")
    adapter_imports_max: int = Field(
        default=8, ge=1, description="Imports of adapters in flight at a time; one of each organization."
    )
    adapter_import_idle_s_max: float = Field(
        default=60.0, gt=0, description="An import of an adapter of which nothing comes for so long ends."
    )
    adapter_import_s_max: float = Field(default=3600.0, gt=0, description="Longest arrival of an adapter's files.")
    imported_adapters_max: int = Field(default=200, ge=1, description="Imported adapters of one project.")

    usage_batch_s: float = Field(default=0.005, ge=0, description="How long a usage record waits for company.")
    usage_batch_max: int = Field(default=500, ge=1, description="Usage records in one event.")
    metering_interval_s: float = Field(
        default=5.0, gt=0, description="Pause between records of running calls; a crash loses the use of one at most."
    )
    usage_waiting_max: int = Field(
        default=10_000, ge=1, description="Usage records that wait for the database before calls are refused."
    )
    endpoints_max: int = Field(default=100, ge=1, description="Endpoints of one project.")
    deleted_endpoint_retention_s: float = Field(
        default=365 * 86400.0, gt=0, description="How long the row of a deleted endpoint is kept."
    )
    endpoint_poll_s: float = Field(default=0.5, gt=0, description="Pause between looks at endpoints that must move.")
    endpoints_batch_max: int = Field(default=100, ge=1, description="Endpoints that one look takes.")
    claim_duration_s: float = Field(
        default=10.0, gt=0, description="How long a process's claim on an endpoint lives unrenewed."
    )
    owner_channel_idle_s_max: float = Field(
        default=60.0, gt=0, description="A channel to another process that no call used for longer is closed."
    )
    clock_jump_s_max: float = Field(
        default=2.0, gt=0, description="The database's clock was set when it goes wrong by more between two looks."
    )
    served_models_max: int = Field(
        default=20_000, ge=1, description="Names of one kind that ListServedModels gives; more are refused."
    )
    device_renewal_s: float = Field(
        default=1.0, gt=0, description="Pause between renewals of the devices of engines that serve everybody."
    )
    shared_engine_gpus: int = Field(
        default=1, ge=1, le=64, description="GPUs of an engine that serves everybody; on a CPU it takes no device."
    )
    shared_engine_idle_s_max: float = Field(
        default=300.0, gt=0, description="An engine on GPUs that serves everybody and nobody uses leaves them after it."
    )
    device_margin_s: float = Field(
        default=3.0,
        gt=0,
        description="How long before the end of their lease an engine leaves its devices, and is dead by that end.",
    )
    scheduler_deadline_s: float = Field(
        default=3.0, gt=0, description="Longest call to the scheduler; much shorter than its leases."
    )
    credit_chunk_nanos_usd: int = Field(
        default=10**9, ge=0, description="Credit that a lease is enlarged by beyond what calls need, at most."
    )
    credit_renewal_s: float = Field(default=1.0, gt=0, description="Pause between renewals of the leases of credit.")
    credit_idle_s: float = Field(default=10.0, gt=0, description="A lease that no call used for so long is given back.")
    credit_lease_age_s_max: float = Field(
        default=3600.0, gt=0, description="A lease of that age is given back when its calls have ended."
    )
    credit_wait_s_max: float = Field(default=8.0, gt=0, description="Longest wait of a call for credit.")
    credit_refusal_s: float = Field(
        default=1.0, ge=0, description="How long billing is not asked again after it said that there is no more."
    )
    credit_part_tokens: int = Field(
        default=4096, ge=2, description="Tokens that a streamed answer reserves at a time; shorter ones reserve all."
    )
    endpoint_minutes_covered_min: int = Field(
        default=10,
        ge=0,
        le=1440,
        description="An endpoint starts when credit and caps cover so many of its minutes; 0 asks for nothing.",
    )
    spending_poll_s: float = Field(
        default=2.0, gt=0, description="Pause between looks at what another process heard of credit and caps."
    )
    endpoint_silence_s_max: float = Field(
        default=15.0,
        gt=0,
        description="Longest time between two confirmations of an endpoint's devices that is billed.",
    )
    endpoint_minute_s: float = Field(default=60.0, gt=0, description="Length of a billed minute.")

    @property
    def checks_models_fully(self) -> bool:
        """Whether an import is loaded as an engine loads it, which takes seconds and torch."""
        return self.import_check == "full" or (self.import_check == "auto" and self.engine != "stub")

    def engine_settings(
        self, *, adapters: bool, gpu_indices: tuple[int, ...] = (), parsers: AnswerParsers = NO_PARSERS
    ) -> EngineSettings:
        """What an engine is given; without adapters for models that are tuned as a whole."""
        return EngineSettings(
            context_tokens_max=self.context_tokens_max,
            sequences_max=self.sequences_max,
            queue_requests_max=self.queue_requests_max,
            kv_cache_bytes=self.kv_cache_bytes,
            gpu_memory_fraction=self.gpu_memory_fraction,
            gpu_indices=gpu_indices,
            threads=self.engine_threads,
            prompt_chars_short_max=self.prompt_chars_short_max,
            prompt_workers=self.prompt_workers,
            prompt_s_max=self.prompt_s_max,
            long_prompt_s_max=self.long_prompt_s_max,
            prompt_memory_bytes_max=self.prompt_memory_bytes_max,
            parsers=parsers,
            answer_part_s_max=self.answer_part_s_max,
            answer_s_max=self.answer_s_max,
            guide_s_max=self.guide_s_max,
            adapters_resident_max=self.adapters_resident_max if adapters else 0,
            adapter_rank_max=self.adapter_rank_max,
            adapter_bytes_max=self.adapter_bytes_max,
            start_timeout_s=self.engine_start_s_max,
        )
