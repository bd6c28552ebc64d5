"""Compares how people took the boxes of two versions, image by image.

A version that measured well can still be worse on the images that people work on. Their first
corrections tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_ind
from sqlalchemy import select
from sqlalchemy.orm import Session

from ml_backend.store.tables import Audit

ENOUGH_IMAGES = 10
"""Images of each version that people must have seen."""
MOST_IMAGES = 200
"""Images of each version that are looked at, the first ones: after each annotation all would be."""
FALL = 0.1
"""Share of boxes accepted by which a version must be behind; less may be the choice of images."""
CERTAINTY = 0.01
"""Probability that the images alone make such a difference, at most."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The boxes that people left as they were, in the mean over images.

    Attributes:
        shares: of each image: accepted boxes among all that were predicted or added.
    """

    shares: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean share."""
        return float(np.mean(self.shares)) if self.shares else 0.0


def acceptance(session: Session, project_id: int, version: str) -> Acceptance:
    """Reads how people took the boxes of a version; of images without any box, nothing."""
    rows = session.execute(
        select(Audit.accepted, Audit.moved, Audit.relabelled, Audit.deleted, Audit.added)
        .where(
            Audit.project_id == project_id,
            Audit.version == version,
            Audit.standing,
            Audit.blind.is_(False),
            # Accepted in bulk, or made over the API: nobody looked.
            Audit.lead_time.is_not(None),
        )
        .order_by(Audit.annotation_id)
        .limit(MOST_IMAGES)
    ).all()
    return Acceptance([row[0] / sum(row) for row in rows if sum(row)])


def is_taken_worse(after: Acceptance, before: Acceptance) -> bool:
    """Tells whether people accept a version's boxes less than those of the version before.

    Welch's test (1947), one-sided, over images.
    """
    if min(len(after.shares), len(before.shares)) < ENOUGH_IMAGES:
        return False
    if after.mean > before.mean - FALL:
        return False
    if np.ptp(after.shares) == np.ptp(before.shares) == 0:
        return True
    test = ttest_ind(after.shares, before.shares, equal_var=False, alternative="less")
    return float(test.pvalue) < CERTAINTY
