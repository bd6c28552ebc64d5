"""Answers requests for predictions, and runs the jobs that predict or remove predictions."""
