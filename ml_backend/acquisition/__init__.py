"""Chooses which tasks people are asked to annotate next, and which are shown without boxes.

Nothing is imported here: the worker process imports `stable_random` and `control_group`, and must
not load PyTorch with them.
"""
