"""Each loss on preferences against its paper's formula, written out number by number; and the gradients of its
log-probabilities."""

import math

import pytest
import torch

from services.trainer.train.losses import cross_entropy as loss_module
from services.trainer.train.losses.log_probs import row_sums, token_log_probs
from services.trainer.train.losses.preference_loss import Answers, PreferenceLoss, preference_loss
from services.trainer.train.settings.methods import Dpo
from tests.train.head_case import head_case

# Two pairs: sums of log-probabilities and lengths of the preferred answers and of the others.
PREFERRED, OTHER = [-12.5, -3.25], [-11.0, -9.75]
REFERENCE_PREFERRED, REFERENCE_OTHER = [-13.0, -4.0], [-10.5, -9.0]
LENGTHS_PREFERRED, LENGTHS_OTHER = [5, 2], [4, 6]


def ours(dpo: Dpo, *, reference: bool = True) -> PreferenceLoss:
    preferred = Answers(
        policy=torch.tensor(PREFERRED),
        reference=torch.tensor(REFERENCE_PREFERRED) if reference else None,
        lengths=torch.tensor(LENGTHS_PREFERRED),
    )
    other = Answers(
        policy=torch.tensor(OTHER),
        reference=torch.tensor(REFERENCE_OTHER) if reference else None,
        lengths=torch.tensor(LENGTHS_OTHER),
    )
    return preference_loss(preferred, other, dpo)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def check(found: PreferenceLoss, expected: list[float]) -> None:
    assert found.losses.dtype == torch.float32
    assert found.losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_dpo_is_equation_7() -> None:
    expected = []
    for w, l, ref_w, ref_l in zip(PREFERRED, OTHER, REFERENCE_PREFERRED, REFERENCE_OTHER, strict=True):  # noqa: E741
        expected.append(-math.log(sigmoid(0.1 * (w - ref_w) - 0.1 * (l - ref_l))))
    found = ours(Dpo(beta=0.1))
    check(found, expected)
    assert found.preferred_rewards.tolist() == pytest.approx([0.1 * 0.5, 0.1 * 0.75], abs=1e-6)
    assert found.other_rewards.tolist() == pytest.approx([0.1 * -0.5, 0.1 * -0.75], abs=1e-6)


def test_log_ratios_by_length_are_means_over_tokens() -> None:
    expected = []
    for pair in range(2):
        ratio_w = (PREFERRED[pair] - REFERENCE_PREFERRED[pair]) / LENGTHS_PREFERRED[pair]
        ratio_l = (OTHER[pair] - REFERENCE_OTHER[pair]) / LENGTHS_OTHER[pair]
        expected.append(-math.log(sigmoid(0.5 * (ratio_w - ratio_l))))
    check(ours(Dpo(beta=0.5, normalize_logratios_by_length=True)), expected)


def test_without_a_reference_the_policy_stands_alone() -> None:
    expected = [-math.log(sigmoid(0.2 * (w - l))) for w, l in zip(PREFERRED, OTHER, strict=True)]  # noqa: E741
    dpo = Dpo(beta=0.2, reference_free=True)
    assert not dpo.needs_reference
    check(ours(dpo, reference=False), expected)


def test_rpo_adds_the_likelihood_of_the_preferred_answer_per_token() -> None:
    plain = ours(Dpo(beta=0.1)).losses.tolist()
    expected = [loss - 1.5 * w / length for loss, w, length in zip(plain, PREFERRED, LENGTHS_PREFERRED, strict=True)]
    check(ours(Dpo(beta=0.1, rpo_alpha=1.5)), expected)


def test_simpo_is_equation_6_whatever_else_is_asked_for() -> None:
    expected = []
    for pair in range(2):
        w, l = PREFERRED[pair] / LENGTHS_PREFERRED[pair], OTHER[pair] / LENGTHS_OTHER[pair]  # noqa: E741
        expected.append(-math.log(sigmoid(2.0 * w - 2.0 * l - 0.7)))
    dpo = Dpo(beta=2.0, simpo_gamma=0.7)
    assert dpo.by_length
    assert not dpo.needs_reference
    check(ours(dpo, reference=False), expected)


def test_a_hopeless_pair_has_a_finite_loss() -> None:
    worse, better = (
        Answers(policy=torch.tensor([sum_]), reference=None, lengths=torch.tensor([1])) for sum_ in (-1e4, 0.0)
    )
    assert preference_loss(worse, better, Dpo(beta=1.0, reference_free=True)).losses.item() == pytest.approx(1e4)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probs_in_chunks_are_the_plain_ones_with_their_gradients(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
    hidden, weight, labels, capped = head_case(softcap)
    counts = torch.tensor([10, 0, 20, 3])
    # A loss that is no sum over tokens: every row gets a slope of its own.
    plain_scores = torch.log_softmax(capped, dim=-1).gather(1, labels[:, None]).squeeze(1)
    plain = torch.stack([part.sum() for part in plain_scores.split(counts.tolist())])
    expected = torch.autograd.grad((plain**2).sum(), [hidden, weight])
    scores = token_log_probs(hidden, weight, labels, softcap)
    rows = torch.arange(4).repeat_interleave(counts)
    sums = row_sums(scores, rows, 4)
    torch.testing.assert_close(sums, plain, rtol=1e-5, atol=1e-5)
    assert sums[1].item() == 0.0
    for one, other in zip(torch.autograd.grad((sums**2).sum(), [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    frozen = token_log_probs(hidden, weight.detach(), labels, softcap)
    (only,) = torch.autograd.grad((row_sums(frozen, rows, 4) ** 2).sum(), [hidden])
    torch.testing.assert_close(only, expected[0], rtol=1e-4, atol=1e-4)
