"""The circuit breaker: when a request is allowed."""

from __future__ import annotations

from ml_backend.label_studio.circuit_breaker import CircuitBreaker


def test_circuit_breaker_answered_requests_are_always_allowed() -> None:
    breaker = CircuitBreaker()
    for _ in range(3):
        assert breaker.remaining() == 0
        breaker.record(answered=True)


def test_circuit_breaker_unanswered_request_starts_a_pause_that_doubles() -> None:
    breaker = CircuitBreaker()
    pauses = []
    for _ in range(8):
        breaker.record(answered=False)
        pauses.append(breaker.remaining())
    lengths = [2, 4, 8, 16, 32, 60, 60, 60]
    assert all(0 <= pause <= length for pause, length in zip(pauses, lengths, strict=True))
    # The clock moves on between the two calls, so a remaining pause is a little shorter.
    assert pauses[-1] > 32


def test_circuit_breaker_answer_after_a_pause_allows_requests_again() -> None:
    breaker = CircuitBreaker()
    breaker.record(answered=False)
    breaker.record(answered=True)
    assert breaker.remaining() == 0
    breaker.record(answered=False)
    assert breaker.remaining() <= 2
