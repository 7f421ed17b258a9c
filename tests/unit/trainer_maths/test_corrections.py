"""Importance correction: golden numbers for levels, caps and bounds, and which rule is counted."""

import math

import pytest
import torch

from tracegrad.tracestore.algorithm import CorrectionConfig, Rejection
from tracegrad.trainer.corrections import correct, rejection_reasons

CHOICE = torch.tensor([5, 5, 9])


def weights(ratios, **config):
    proximal = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)
    return correct(proximal, torch.zeros_like(proximal), CHOICE, CorrectionConfig(**config))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [2.0, 0.5, 1.5]),  # truncated at 2
        ({"weights": "off"}, [1.0, 1.0, 1.0]),
        ({"cap": None}, [4.0, 0.5, 1.5]),
        ({"weights": "sequence", "cap": 1.75}, [1.75, 1.75, 1.5]),  # 4 * 0.5 = 2
        ({"weights": "geometric"}, [math.sqrt(2), math.sqrt(2), 1.5]),
        ({"cap": None, "reject": (Rejection(low=0.6, high=3.0),)}, [0.0, 0.0, 1.5]),  # two-sided (IcePop)
        ({"weights": "sequence", "cap": None, "reject": (Rejection(level="sequence", high=1.9),)}, [0.0, 0.0, 1.5]),
        ({"weights": "off", "reject": (Rejection(level="geometric", low=1.0, high=1.45),)}, [1.0, 1.0, 0.0]),
    ],
)
def test_golden_numbers(config, expected):
    assert weights([4.0, 0.5, 1.5], **config).weight_E.tolist() == pytest.approx(expected)


def test_the_first_rule_that_holds_is_counted_with_its_side():
    reject = (Rejection(level="geometric", high=1.45), Rejection(low=0.6, high=3.0))
    found = weights([4.0, 0.5, 1.5], reject=reject)
    assert found.rejected_E.tolist() == [4, 3, 2]
    words = rejection_reasons(CorrectionConfig(reject=reject))
    assert [words[code - 1] for code in found.rejected_E.tolist()] == [
        "token ratio high",
        "token ratio low",
        "geometric ratio high",
    ]


def test_a_ratio_beyond_all_numbers_is_capped_or_rejected_not_infinite():
    far = [1e300, 1e300, 1.0]
    assert weights(far, weights="sequence").weight_E.tolist() == [2.0, 2.0, 1.0]
    assert weights(
        far, weights="sequence", cap=None, reject=(Rejection(level="sequence", high=5.0),)
    ).weight_E.tolist() == [
        0.0,
        0.0,
        1.0,
    ]


def test_nothing_here_carries_a_gradient():
    leaf = torch.zeros(3, requires_grad=True)
    assert not correct(leaf, torch.zeros(3), CHOICE, CorrectionConfig()).weight_E.requires_grad
