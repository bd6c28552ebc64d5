"""What people are told the next labels are worth."""

from __future__ import annotations

import numpy as np
import pytest

from ml_backend.audits.label_value import Version, worth_of


def _curve(images: list[int], scores: list[float], *, agreement: float = 0.8) -> list[Version]:
    return [
        Version(n, s, s - 0.02, s + 0.02, agreement) for n, s in zip(images, scores, strict=True)
    ]


def test_two_trainings_are_too_early() -> None:
    worth = worth_of(_curve([10, 20], [0.5, 0.6]), more=10, untouched=None)
    assert worth.gain is None
    assert not worth.stop
    assert worth.words.startswith(
        "too early to say what the next labels are worth: 1 more training"
    )
    assert "3 more trainings" in worth_of([], more=10, untouched=None).words


def test_a_steep_curve_says_go_on_and_by_how_much() -> None:
    # A tenth for each doubling: from 80 to 160 images, 10 points.
    worth = worth_of(_curve([10, 20, 40, 80], [0.4, 0.5, 0.6, 0.7]), more=80, untouched=0.7)
    assert worth.gain == pytest.approx(0.1)
    assert worth.low is not None
    assert worth.high is not None
    assert 0 < worth.low < 0.1 < worth.high
    assert "the next 80 images are worth +10.0 points of AP50" in worth.words
    assert "people leave 70% of the boxes untouched" in worth.words
    assert worth.words.endswith("go on")


def test_a_flat_curve_of_versions_that_agree_says_stop() -> None:
    flat = _curve([100, 200, 400, 800], [0.91, 0.912, 0.911, 0.912], agreement=0.97)
    worth = worth_of(flat, more=100, untouched=0.96)
    assert worth.stop
    assert "it is time to stop" in worth.words
    # The same curve, while versions differ or people still correct, does not.
    restless = _curve([100, 200, 400, 800], [0.91, 0.912, 0.911, 0.912], agreement=0.8)
    assert "but versions still differ" in worth_of(restless, more=100, untouched=0.96).words
    assert "but people still correct much" in worth_of(flat, more=100, untouched=0.6).words


def test_noise_is_told_as_noise() -> None:
    wide = [Version(n, s, s - 0.2, s + 0.2, None) for n, s in [(12, 0.5), (20, 0.45), (30, 0.52)]]
    worth = worth_of(wide, more=10, untouched=None)
    assert worth.low is not None
    assert worth.high is not None
    assert worth.low < 0 < worth.high
    assert "cannot be told from the noise" in worth.words


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    images, hits = [20, 30, 45, 70, 100, 150], 0
    for _ in range(300):
        noise = random.normal(0, 0.03, 6)
        scores = [0.3 + 0.08 * float(np.log2(n)) + e for n, e in zip(images, noise, strict=True)]
        versions = [
            Version(n, s, s - 1.645 * 0.0224, s + 1.645 * 0.0224, None)
            for n, s in zip(images, scores, strict=True)
        ]
        worth = worth_of(versions, more=150, untouched=None)
        assert worth.low is not None
        assert worth.high is not None
        hits += worth.low <= 0.08 <= worth.high
    assert 0.84 < hits / 300 < 0.96


def test_cards_that_say_too_little_are_passed_over() -> None:
    assert Version.of({"data": {"tasks": 5}, "metrics": {"map50": 0.5}}) is None
    card = {
        "data": {"images": 40},
        "metrics": {"map50": 0.5, "map50_interval": {"low": 0.4, "high": 0.6}},
    }
    assert Version.of(card) == Version(40, 0.5, 0.4, 0.6, None)
