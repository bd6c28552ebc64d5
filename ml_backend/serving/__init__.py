"""Answers requests for predictions, and predicts the tasks that nobody opened."""
