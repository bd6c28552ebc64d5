"""Looks at everything that must be right."""
