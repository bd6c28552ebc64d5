"""A machine-learning backend for Label Studio: detectors that pre-annotate and learn."""

__version__ = "0.1.0"
