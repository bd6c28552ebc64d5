"""Detectors: architectures, presets, training, prediction, measuring.

Works on boxes and tensors, and knows neither settings nor Label Studio.
"""
