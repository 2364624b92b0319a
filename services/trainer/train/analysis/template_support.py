"""What the chat template of a base model can render, by the rules that refuse rows. It knows no dataset."""

from dataclasses import dataclass
from datetime import date

from formats.prompts.model_folder import ModelFolder
from services.trainer.train.data.tokens.template import ChatTemplate, check_template
from services.trainer.train.settings.failures import Failure


@dataclass(frozen=True, kw_only=True)
class TemplateFacts:
    supports_tools: bool
    supports_reasoning: bool


def describe_template(folder: ModelFolder, template_date: str) -> TemplateFacts:
    """False for a model without a template that conversations can be trained with; prompts and texts need none."""
    try:
        template = ChatTemplate.of(folder, date.fromisoformat(template_date))
        check_template(template)
    except Failure:
        return TemplateFacts(supports_tools=False, supports_reasoning=False)
    return TemplateFacts(supports_tools=template.supports_tools, supports_reasoning=template.supports_reasoning)
