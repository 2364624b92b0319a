"""Which objective a method has. It knows no formula."""

from services.trainer.train.losses.kto import Judged
from services.trainer.train.losses.objective import Objective, Preferences, Reference, Supervised
from services.trainer.train.settings.methods import Dpo, Kto, MethodSettings


def objective_of(
    settings: MethodSettings | None, reference: Reference | None, mismatched: Reference | None
) -> Objective:
    """Of one file: `reference` is that of its rows, `mismatched` that of its mismatched rows, for a method that needs
    them."""
    match settings:
        case None:
            return Supervised()
        case Dpo():
            return Preferences(settings, reference)
        case Kto():
            assert reference is not None and mismatched is not None
            return Judged(settings, reference, mismatched)
