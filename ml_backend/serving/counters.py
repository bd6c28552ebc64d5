"""Defines the counters of predictions that `/metrics` shows."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

PREDICTED = Counter("ml_backend_predicted_tasks_total", "Tasks answered with a prediction")
LEFT_OVER = Counter(
    "ml_backend_left_over_tasks_total", "Tasks that a request left over, finished later"
)
IMAGE_FAILURES = Counter(
    "ml_backend_image_failures_total", "Images that could not be had", ["reason"]
)
WEBHOOKS = Counter("ml_backend_webhooks_total", "Webhooks received", ["action"])
REQUEST_SECONDS = Histogram(
    "ml_backend_request_seconds",
    "Time to answer a request",
    ["endpoint", "status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 100),
)
