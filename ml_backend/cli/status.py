"""`status`: shows projects, their live versions, and their jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ml_backend.cli.jobs import job_as_dict
from ml_backend.cli.opening import open_backend
from ml_backend.cli.options import JsonOption
from ml_backend.cli.output import ap50_words, out, print_json
from ml_backend.wording import words

if TYPE_CHECKING:
    from ml_backend.audits.label_value import LabelValue
    from ml_backend.audits.summary import Summary
    from ml_backend.backend import Backend
    from ml_backend.settings import Settings
    from ml_backend.store.tables import Job, Project

_NEWEST = 3
"""Jobs of each kind that are shown."""


def status(as_json: JsonOption = False) -> None:
    """Show projects, live versions, what the next labels are worth, and jobs with their reasons."""
    from ml_backend.wording import told
    from ml_backend.wording.audits import summary_lines, with_words

    backend = open_backend()
    settings = backend.settings
    projects, jobs = _projects_and_jobs(backend)
    cards = {p.id: {v.name: v.card for v in backend.versions.all(p.id)} for p in projects}
    audits = {p.id: backend.audits.summary(p.id) for p in projects}
    values = {
        p.id: _label_value(settings, list(cards[p.id].values()), audits[p.id], p.live_version)
        for p in projects
    }
    if as_json:
        print_json(
            [
                {
                    "project": p.key,
                    "title": p.title,
                    "live_version": p.live_version,
                    "heard_at": p.heard_at,
                    "metrics": cards[p.id].get(p.live_version or "", {}).get("metrics"),
                    "audits": with_words(summary.as_dict()) if (summary := audits[p.id]) else None,
                    "worth": values[p.id].as_dict() | told("words", values[p.id].reason),
                    "jobs": [job_as_dict(job) for job in jobs[p.id]],
                }
                for p in projects
            ]
        )
        return
    if not projects:
        out.print("No project yet: `ml-backend connect --project ID` connects one.")
        return
    for p in projects:
        card = cards[p.id].get(p.live_version or "")
        quality = f", AP50 {ap50_words(card)}" if card else ""
        out.print(f"[bold]{escape(p.title or 'project')}[/] ({p.key})", highlight=False)
        out.print(f"  live: {escape(p.version)}{quality}", highlight=False)
        if summary := audits[p.id]:
            for line in summary_lines(summary):
                out.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
        if cards[p.id]:
            out.print(f"  {escape(words(values[p.id].reason))}", highlight=False, soft_wrap=True)
        for job in jobs[p.id]:
            percent = f" {job.progress:.0%}" if job.state == "running" else ""
            out.print(
                f"  {job.kind} {job.id}: [bold]{job.state}[/]{percent}: "
                f"{escape(words(job.reason))}",
                highlight=False,
                soft_wrap=True,
            )


def _projects_and_jobs(backend: Backend) -> tuple[Sequence[Project], dict[int, Sequence[Job]]]:
    """Reads all projects, and the newest jobs of each kind by project, newest first."""
    from sqlalchemy import func, select

    from ml_backend.store.tables import Job, Project

    rank = select(
        Job.id,
        Job.project_id,
        func.row_number()
        .over(partition_by=(Job.project_id, Job.kind), order_by=Job.id.desc())
        .label("rank"),
    ).subquery()
    with backend.database.reading() as session:
        projects = session.scalars(select(Project).order_by(Project.id)).all()
        jobs = {
            p.id: session.scalars(
                select(Job)
                .where(
                    Job.id.in_(
                        select(rank.c.id).where(rank.c.project_id == p.id, rank.c.rank <= _NEWEST)
                    )
                )
                .order_by(Job.id.desc())
            ).all()
            for p in projects
        }
    return projects, jobs


def _label_value(
    settings: Settings, cards: list[dict[str, Any]], audits: Summary | None, live: str | None
) -> LabelValue:
    """Estimates the value of further labels, from the cards of all versions, newest first."""
    from ml_backend.audits.label_value import Version, more_images, value_of_labels

    versions = [v for card in reversed(cards) if (v := Version.of(card)) is not None]
    made_of_live = audits.versions.get(live) if audits is not None and live is not None else None
    return value_of_labels(
        versions,
        more=more_images(versions, every=settings.train_every, growth=settings.train_growth),
        untouched=made_of_live.boxes.accepted_share if made_of_live is not None else None,
    )
