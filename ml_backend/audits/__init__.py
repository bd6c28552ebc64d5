"""Counts what became of predicted boxes, the time they saved, and the value of further labels."""
