"""Billing's settings: where its price books lie, and every limit of what it takes. Read once, at the start."""

from datetime import timedelta
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from chassis.bus.durables import ARCHIVE_ACK_WAIT_S, ARCHIVE_PENDING_MAX
from chassis.settings import ChassisSettings
from services.billing.limits import FactLimits, Limits
from services.billing.terms import InvoiceTerms, Party

MIGRATIONS = Path(__file__).parent / "migrations"
# Most of the wait for an answer that events may be gathered for: half of it is for storing them.
ARCHIVE_GATHERING_SHARE_MAX = 0.4


class BillingSettings(ChassisSettings):
    service_name: str = "billing"
    price_books_dir: Path = Field(
        default=Path(__file__).parent / "prices" / "books", description="Folder of price books, *.yaml."
    )
    price_book: str = Field(default="default", description="Name of the book that prices new work.")

    gateway_address: str = Field(default="127.0.0.1:7100", description="host:port of the gateways' mesh servers.")

    job_tokens_max: int = Field(default=10**14, ge=1, description="Largest token count of one epoch or evaluation.")
    job_epochs_max: int = Field(default=1000, ge=1, description="Most epochs of a priced job.")
    job_evaluations_max: int = Field(default=1000, ge=1, description="Most evaluations per epoch of a priced job.")
    amount_nanos_usd_max: int = Field(default=10**18, ge=1, le=10**18, description="Largest price, top-up or balance.")

    usage_tokens_max: int = Field(default=10**12, ge=1, description="Largest token count of one usage event.")
    usage_devices_max: int = Field(default=4096, ge=1, description="Most devices of one replica.")
    usage_nodes_max: int = Field(default=4096, ge=1, description="Most nodes of one cluster.")
    usage_steps_max: int = Field(default=10**9, ge=1, description="Largest step, minute or hour of a usage event.")
    clock_skew_s_max: float = Field(default=3600.0, ge=0, description="How far a usage time may lie in the future.")

    hold_ttl_s: float = Field(default=86_400.0, gt=0, description="A hold that nobody renews is overdue after it.")
    hold_renewals_max: int = Field(default=1000, ge=1, description="Holds of one renewal, list or ending.")
    hold_overdue_interval_s: float = Field(default=300.0, gt=0, description="Pause between warnings of overdue holds.")
    credit_lease_s: float = Field(
        default=120.0, gt=0, description="A lease of credit that is not renewed ends after it."
    )
    credit_lease_share: int = Field(
        default=8,
        ge=2,
        description="Beyond what calls wait for, a grant takes at most one part in so many of what is left.",
    )
    credit_recall_s_max: float = Field(default=2.0, ge=0, description="Longest wait for credit that idle leases hold.")
    credit_recall_poll_s: float = Field(default=0.1, gt=0, description="Pause between looks whether it came back.")
    credit_late_usage_s: float = Field(
        default=86_400.0, gt=0, description="How long a closed lease waits for the usage of its last calls."
    )
    credit_returns_max: int = Field(default=1000, ge=1, description="Leases of one renewal that come to less.")
    credit_price_s: float = Field(
        default=3600.0, gt=0, description="How far ahead the price of tokens is told; half of it it may be used."
    )
    credit_collect_interval_s: float = Field(default=5.0, gt=0, description="Pause between looks for leases to end.")
    budget_alert_retention_s: float = Field(
        default=400 * 86_400.0, gt=40 * 86_400.0, description="How long it is known that a budget's warning went out."
    )
    budgets_max: int = Field(default=1000, ge=1, description="Budgets of one project and its keys.")

    request_id_chars_max: int = Field(default=128, ge=1, description="Longest request_id.")
    page_size_max: int = Field(default=1000, ge=1, description="Usage records of one page.")

    # Documents.
    issuer_legal_name: str = Field(default="finemesh operator", description="Who sends the invoices.")
    issuer_address_lines: tuple[str, ...] = Field(default=(), description="Its postal address, a JSON list of lines.")
    issuer_tax_id: str = Field(default="", description="Its tax id, such as a VAT number.")
    issuer_email: str = Field(default="", description="Where questions about invoices go.")
    invoice_tax_note: str = Field(default="", description="What every invoice says about taxes.")
    invoice_grace_s: float = Field(default=72 * 3600.0, ge=0, description="Time after a month before it is closed.")
    invoice_close_interval_s: float = Field(default=600.0, gt=0, description="Pause between looks for what to close.")
    invoice_close_batch_max: int = Field(default=100, ge=1, description="Months that one look for what to close takes.")
    invoice_lines_max: int = Field(default=10_000, ge=1, description="Lines of one invoice.")
    invoice_names_max: int = Field(default=10_000, ge=1, description="Usage records named in one invoice.")
    invoice_names_per_line_max: int = Field(default=100, ge=1, description="Usage records named in one line.")
    invoice_names_scan_max: int = Field(default=10_000, ge=1, description="Records looked at to name those of lines.")
    party_text_chars_max: int = Field(default=200, ge=1, description="Longest name, address line, tax id or email.")
    party_lines_max: int = Field(default=10, ge=1, description="Lines of a postal address.")
    credit_reason_chars_max: int = Field(default=500, ge=1, description="Longest reason of a credit note.")
    cost_days_max: int = Field(default=400, ge=1, description="Days of one report of cost.")
    cost_rows_max: int = Field(default=10_000, ge=1, description="Rows of one report of cost.")
    usage_scan_max: int = Field(default=20_000, ge=1, description="Records looked at for one page of filtered usage.")
    export_batch_max: int = Field(default=2000, ge=1, description="Records read at a time for an export.")

    # The archive of usage events. What it is to be kept for is said in docs/archive.md.
    artifacts_url: str = Field(default="file:///var/lib/finemesh/artifacts", description="Root of the artifact store.")
    archive_interval_s: float = Field(default=30.0, gt=0, description="Events are gathered for it, then filed.")
    archive_ack_wait_s: float = Field(
        default=ARCHIVE_ACK_WAIT_S, ge=1, description="Events that are not archived come again after it."
    )
    archive_pending_max: int = Field(
        default=ARCHIVE_PENDING_MAX,
        ge=1,
        description="Events of a stream, at all replicas, that wait for their file; more stay on the bus.",
    )
    archive_fetch_max: int = Field(default=200, ge=1, description="Events fetched for the archive at a time.")
    archive_file_events_max: int = Field(default=5000, ge=1, le=10_000, description="Events of one file.")
    archive_file_bytes_max: int = Field(default=16 * 1024**2, ge=1024**2, description="Payloads of one file, about.")
    archive_unpacked_bytes_max: int = Field(default=64 * 1024**2, ge=1024**2, description="Largest file that is read.")
    archive_backoff_s_max: float = Field(default=10.0, gt=0, description="Longest pause before a file is tried again.")
    archive_write_s_max: float = Field(default=3600.0, gt=0, description="A write that lasts longer is taken for dead.")
    archive_late_s: float = Field(default=900.0, gt=0, description="Events that wait longer make its health bad.")
    archive_look_interval_s: float = Field(default=15.0, gt=0, description="Pause between looks for events that wait.")
    # For ever: what the ledger was booked from is asked for years later, and a year of 100 events/s is some 100 GB.
    archive_retention_s: float = Field(default=0.0, ge=0, description="Age at which files are deleted; 0: never.")
    archive_keep_interval_s: float = Field(default=3600.0, gt=0, description="Pause between looks for what to delete.")
    archive_keep_batch_max: int = Field(default=100, ge=1, description="Objects that one look deletes.")

    # Verification, journal, dead letters.
    verifications_max: int = Field(default=1, ge=1, description="Verifications that run at a time.")
    verify_batch_rows: int = Field(default=1000, ge=1, description="Rows that a verification holds of a table.")
    verify_statement_timeout_s: float = Field(default=1800.0, gt=0, description="Longest statement of a verification.")
    verify_progress_s: float = Field(default=0.5, ge=0, description="Pause between tellings of a verification.")
    journal_batch_rows: int = Field(default=500, ge=1, le=5000, description="Entries in one answer of an export.")
    dead_letter_batch_rows: int = Field(default=20, ge=1, description="Dead letters read at a time; each can be large.")

    @model_validator(mode="after")
    def check_archive_times(self) -> Self:
        """Events are gathered, then stored with half of the wait for tries: they must not come again meanwhile."""
        if self.archive_interval_s > self.archive_ack_wait_s * ARCHIVE_GATHERING_SHARE_MAX:
            raise ValueError(
                f"archive_interval_s may be {ARCHIVE_GATHERING_SHARE_MAX:.0%} of archive_ack_wait_s at most"
            )
        if self.archive_pending_max < self.archive_file_events_max:
            raise ValueError("archive_pending_max must be archive_file_events_max at least: no file would be full")
        if self.archive_late_s <= self.archive_ack_wait_s:
            raise ValueError(
                "archive_late_s must be more than archive_ack_wait_s: a dead replica's events wait for that"
            )
        return self

    @property
    def limits(self) -> Limits:
        return Limits(
            tokens_max=self.job_tokens_max,
            epochs_max=self.job_epochs_max,
            evaluations_max=self.job_evaluations_max,
            amount_nanos_usd_max=self.amount_nanos_usd_max,
        )

    @property
    def credit_late_usage(self) -> timedelta:
        return timedelta(seconds=self.credit_late_usage_s)

    @property
    def invoice_terms(self) -> InvoiceTerms:
        return InvoiceTerms(
            issuer=Party(
                legal_name=self.issuer_legal_name,
                address_lines=self.issuer_address_lines,
                tax_id=self.issuer_tax_id,
                email=self.issuer_email,
            ),
            tax_note=self.invoice_tax_note,
            settling=timedelta(seconds=self.clock_skew_s_max),
            lines_max=self.invoice_lines_max,
            names_max=self.invoice_names_max,
            names_per_line_max=self.invoice_names_per_line_max,
            names_scan_max=self.invoice_names_scan_max,
        )

    @property
    def fact_limits(self) -> FactLimits:
        return FactLimits(
            tokens_max=self.usage_tokens_max,
            devices_max=self.usage_devices_max,
            nodes_max=self.usage_nodes_max,
            steps_max=self.usage_steps_max,
            clock_skew=timedelta(seconds=self.clock_skew_s_max),
        )
