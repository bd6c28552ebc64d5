"""Labelled images in the formats of others."""
