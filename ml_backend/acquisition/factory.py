"""Makes the strategy that a setting names."""

from __future__ import annotations

from ml_backend.acquisition.random_share import RandomShare
from ml_backend.acquisition.reference import Reference
from ml_backend.acquisition.strategies.base import Strategy, StrategyFactory
from ml_backend.extensions import STRATEGIES


def make_strategy(name: str, reference: Reference, version: str, random_share: float) -> Strategy:
    """Makes the strategy of one model version.

    Args:
        name: one of `ml_backend.extensions.STRATEGIES`.
        reference: statistics of the model version's images.
        version: name of the model version.
        random_share: fraction of the tasks whose place in the order is random, in `[0, 1]`.

    Raises:
        UnknownExtension: no strategy has this name.
        ExtensionError: the strategy cannot be imported.
    """
    factory: StrategyFactory = STRATEGIES.load(name)
    strategy = factory(reference, version)
    return RandomShare(strategy, random_share, version) if random_share else strategy
