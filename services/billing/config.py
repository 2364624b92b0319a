"""Billing's settings: where its price books lie, and every limit of what it takes. Read once, at the start."""

from datetime import timedelta
from pathlib import Path

from pydantic import Field

from chassis.settings import ChassisSettings
from services.billing.facts import FactLimits
from services.billing.pricing import Limits


class BillingSettings(ChassisSettings):
    service_name: str = "billing"
    price_books_dir: Path = Field(default=Path(__file__).parent / "books", description="Folder of price books, *.yaml.")
    price_book: str = Field(default="default", description="Name of the book that prices new work.")

    job_tokens_max: int = Field(default=10**14, ge=1, description="Largest token count of one epoch or evaluation.")
    job_epochs_max: int = Field(default=1000, ge=1, description="Most epochs of a priced job.")
    job_evaluations_max: int = Field(default=1000, ge=1, description="Most evaluations per epoch of a priced job.")
    amount_nanos_usd_max: int = Field(default=10**18, ge=1, le=10**18, description="Largest price, top-up or balance.")

    usage_tokens_max: int = Field(default=10**12, ge=1, description="Largest token count of one usage event.")
    usage_devices_max: int = Field(default=4096, ge=1, description="Most devices of one replica.")
    usage_steps_max: int = Field(default=10**9, ge=1, description="Largest step or minute of a usage event.")
    clock_skew_s_max: float = Field(default=3600.0, ge=0, description="How far a usage time may lie in the future.")

    request_id_chars_max: int = Field(default=128, ge=1, description="Longest request_id.")
    page_size_max: int = Field(default=1000, ge=1, description="Usage records of one page.")
    invoice_lines_max: int = Field(default=2000, ge=1, description="Lines of one invoice.")
    invoice_names_max: int = Field(default=20_000, ge=1, description="Usage records named in one invoice.")
    invoice_names_per_line_max: int = Field(default=100, ge=1, description="Usage records named in one line.")

    @property
    def limits(self) -> Limits:
        return Limits(
            tokens_max=self.job_tokens_max,
            epochs_max=self.job_epochs_max,
            evaluations_max=self.job_evaluations_max,
            amount_nanos_usd_max=self.amount_nanos_usd_max,
        )

    @property
    def fact_limits(self) -> FactLimits:
        return FactLimits(
            tokens_max=self.usage_tokens_max,
            devices_max=self.usage_devices_max,
            steps_max=self.usage_steps_max,
            clock_skew=timedelta(seconds=self.clock_skew_s_max),
        )
