"""What a run continues from: the name that a request gives, and the job behind it once it is found. Pure.

`{job or model}[:step]`: a job by its id or resource name, a model by the name that its job gave it.
"""

import re
from dataclasses import dataclass

from services.scheduler.spec.tuning_spec import Lora

ORIGIN_CHARS_MAX = 400
_ORIGIN = re.compile(
    r"(?:(?:projects/(?P<project>[A-Za-z0-9_-]{1,128})/tuningJobs/)?(?P<job>ft-[a-z0-9]{1,64})"
    r"|(?:(?P<namespace>[a-z0-9][a-z0-9._-]{0,62})/)?(?P<model>[a-z0-9][a-z0-9._-]{0,62}))"
    r"(?::(?P<step>[0-9]{1,12}))?"
)


@dataclass(frozen=True, kw_only=True)
class OriginName:
    """Either `job_id` or `output_name` is set. `step` None means what the job shipped."""

    job_id: str = ""
    output_name: str = ""
    namespace: str = ""
    project_id: str = ""
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The job that is continued, and its weights. `lora` None: it trained all weights. `start_weights` is an encoded
    finemesh.nodes.v1.StartWeights."""

    job_id: str
    step: int | None
    base_model: str
    base_revision: str
    lora: Lora | None
    start_weights: bytes


def parse_origin(text: str) -> OriginName | None:
    """None when it names nothing."""
    found = _ORIGIN.fullmatch(text) if len(text) <= ORIGIN_CHARS_MAX else None
    if found is None:
        return None
    step = found["step"]
    return OriginName(
        job_id=found["job"] or "",
        output_name=found["model"] or "",
        namespace=found["namespace"] or "",
        project_id=found["project"] or "",
        step=None if step is None else int(step),
    )
