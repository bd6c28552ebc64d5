"""Controls: the tags of a label config that people draw regions with, one file for each kind.

`ml_backend.extensions.CONTROLS` names the kinds. A new kind is a subclass of `base.Control` in a
file of its own, and one line there (or an entry point in the group `ml_backend.controls`).
"""
