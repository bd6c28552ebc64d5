"""Detectors: presets, training, evaluation, prediction. Boxes and tensors, nothing else."""
