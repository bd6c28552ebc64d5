"""The value of further labels, and the words for it."""

from __future__ import annotations

import numpy as np
import pytest

from ml_backend.audits.label_value import Version, value_of_labels
from ml_backend.wording import words


def _curve(images: list[int], scores: list[float], *, agreement: float = 0.8) -> list[Version]:
    return [
        Version(n, s, s - 0.02, s + 0.02, agreement) for n, s in zip(images, scores, strict=True)
    ]


def test_value_of_labels_two_trainings_is_too_early() -> None:
    value = value_of_labels(_curve([10, 20], [0.5, 0.6]), more=10, untouched=None)
    assert value.gain is None
    assert not value.stop
    assert words(value.reason).startswith(
        "too early to say what the next labels are worth: 1 more training"
    )
    assert "3 more trainings" in words(value_of_labels([], more=10, untouched=None).reason)


def test_value_of_labels_steep_curve_advises_to_go_on_and_tells_the_gain() -> None:
    # A tenth for each doubling: from 80 to 160 images, 10 points.
    value = value_of_labels(_curve([10, 20, 40, 80], [0.4, 0.5, 0.6, 0.7]), more=80, untouched=0.7)
    assert value.gain == pytest.approx(0.1)
    assert value.low is not None
    assert value.high is not None
    assert 0 < value.low < 0.1 < value.high
    assert "the next 80 images are worth +10.0 points of AP50" in words(value.reason)
    assert "people leave 70% of the boxes untouched" in words(value.reason)
    assert words(value.reason).endswith("go on")


def test_value_of_labels_flat_curve_of_versions_that_agree_advises_to_stop() -> None:
    flat = _curve([100, 200, 400, 800], [0.91, 0.912, 0.911, 0.912], agreement=0.97)
    value = value_of_labels(flat, more=100, untouched=0.96)
    assert value.stop
    assert "it is time to stop" in words(value.reason)
    # The same curve, while versions differ or people still correct, does not.
    restless = _curve([100, 200, 400, 800], [0.91, 0.912, 0.911, 0.912], agreement=0.8)
    assert "but versions still differ" in words(
        value_of_labels(restless, more=100, untouched=0.96).reason
    )
    assert "but people still correct much" in words(
        value_of_labels(flat, more=100, untouched=0.6).reason
    )


def test_value_of_labels_wide_intervals_are_told_as_noise() -> None:
    wide = [Version(n, s, s - 0.2, s + 0.2, None) for n, s in [(12, 0.5), (20, 0.45), (30, 0.52)]]
    value = value_of_labels(wide, more=10, untouched=None)
    assert value.low is not None
    assert value.high is not None
    assert value.low < 0 < value.high
    assert "cannot be told from the noise" in words(value.reason)


def test_value_of_labels_interval_holds_the_truth_nine_times_in_ten() -> None:
    random = np.random.default_rng(0)
    images, hits = [20, 30, 45, 70, 100, 150], 0
    for _ in range(300):
        noise = random.normal(0, 0.03, 6)
        scores = [0.3 + 0.08 * float(np.log2(n)) + e for n, e in zip(images, noise, strict=True)]
        versions = [
            Version(n, s, s - 1.645 * 0.0224, s + 1.645 * 0.0224, None)
            for n, s in zip(images, scores, strict=True)
        ]
        value = value_of_labels(versions, more=150, untouched=None)
        assert value.low is not None
        assert value.high is not None
        hits += value.low <= 0.08 <= value.high
    assert 0.84 < hits / 300 < 0.96


def test_version_of_card_that_says_too_little_is_none() -> None:
    assert Version.of({"data": {"tasks": 5}, "metrics": {"map50": 0.5}}) is None
    card = {
        "data": {"images": 40},
        "metrics": {"map50": 0.5, "map50_interval": {"low": 0.4, "high": 0.6}},
    }
    assert Version.of(card) == Version(40, 0.5, 0.4, 0.6, None)
