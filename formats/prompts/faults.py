"""What can be wrong with a model's tokenizer or chat template, and with a conversation under it."""


class ModelFault(Exception):
    """A file of the model is at fault. The text begins with the file or part that is wrong, without an article, such
    as "tokenizer.json is broken: ...", so that a caller can say whose it is."""


class RenderingRefused(Exception):
    """The chat template does not take this conversation. The text says what was expected."""


def broken_template(why: str) -> ModelFault:
    return ModelFault(f"chat template cannot be used: {why}")
