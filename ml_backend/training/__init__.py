"""Trains model versions on stored annotations, and decides whether they go live."""
