"""Acquisition strategies, one file each; `ml_backend.extensions.STRATEGIES` names them."""
