"""Families of detector networks, one file each; the rest of `detection` uses `base` alone."""
