"""Rolls a version back whose boxes people accept less than those of the version before."""

from __future__ import annotations

import logging

from sqlalchemy import select

from ml_backend.audits.acceptance import acceptance, is_taken_worse
from ml_backend.reasons import Code, reason
from ml_backend.store.artefacts import VersionMissing
from ml_backend.store.database import Database
from ml_backend.store.tables import ModelVersion, Project
from ml_backend.training.promotion import Versions

_log = logging.getLogger(__name__)


class AuditedRollback:
    """Rolls versions back by what people made of their boxes.

    Args:
        database: audits and versions.
        versions: rolls back.
    """

    def __init__(self, database: Database, versions: Versions) -> None:
        self._database = database
        self._versions = versions

    def consider(self, project_id: int) -> bool:
        """Rolls the live version back to its parent where people accept its boxes less.

        Returns:
            Whether it did.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
            live = session.scalar(
                select(ModelVersion).where(
                    ModelVersion.project_id == project_id,
                    ModelVersion.name == project.live_version,
                )
            )
            if live is None or live.parent is None:
                return False
            after = acceptance(session, project_id, live.name)
            before = acceptance(session, project_id, live.parent)
        if not is_taken_worse(after, before):
            return False
        why = reason(
            Code.AUDITED_WORSE,
            version=live.parent,
            share=after.mean,
            images=len(after.shares),
            before=before.mean,
            images_before=len(before.shares),
        )
        try:
            self._versions.rollback(project_id, live.parent, only_from=live.name, why=why)
        except VersionMissing as error:
            _log.warning("project %s: %s stays live: %s", project.key, live.name, error)
            return False
        _log.warning("project %s: %s was rolled back: %s", project.key, live.name, dict(why.values))
        return True
