"""`ml-backend`: what an admin types.

Exit status: 0 done; 1 something is wrong, and was said; 2 a setting or an option is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table
from sqlalchemy import func, select
from sqlalchemy.exc import DatabaseError

from ml_backend.settings import Settings, SettingsError, load_settings
from ml_backend.store.database import is_outside
from ml_backend.store.registry import VersionMissing
from ml_backend.store.tables import Job, Project

if TYPE_CHECKING:
    from ml_backend.audits.audits import Summary
    from ml_backend.audits.label_value import Worth

app = typer.Typer(
    help="Pre-annotates Label Studio's tasks and learns from what is annotated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# What people wrote is shown as they wrote it: no emoji, and `escape` around it.
_out = Console(emoji=False)
_err = Console(emoji=False, stderr=True)

# The newest of each kind come first.
_rank = select(
    Job.id,
    Job.project_id,
    func.row_number()
    .over(partition_by=(Job.project_id, Job.kind), order_by=Job.id.desc())
    .label("rank"),
).subquery()

_PORT_WITHIN = 5.0
_NOBODY = 15.0
"""Seconds in which a worker takes what was asked for, where there is one."""
_Number = TypeVar("_Number", int, float)

_Project = Annotated[
    str,
    typer.Option("--project", "-p", help="The project's id, or its key where several have the id."),
]
_Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]


def main() -> None:
    """The console script: what goes wrong is said in one line."""
    try:
        app()
    except SettingsError as error:
        _say_wrong("setting", error)
        sys.exit(2)
    except Exception as error:
        words = _outer_cause(error)
        if words is None:
            raise
        logging.getLogger(__name__).debug("what happened", exc_info=True)
        _fail(words)
        sys.exit(1)


def _outer_cause(error: Exception) -> str | None:
    """What around this program went wrong, with the setting; None for a fault of its own."""
    from ml_backend.label_studio.client import LabelStudioError

    if isinstance(error, LabelStudioError):
        return str(error)
    # Redis is optional: where its client was not imported, nothing can come from it.
    redis = sys.modules.get("redis.exceptions")
    if redis is not None and isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return (
            f"QUEUE_URL: Redis cannot be used: {_in_one_line(error)}. What was asked for is kept, "
            "and done once it is back"
        )
    settings = load_settings()
    if isinstance(error, DatabaseError) and is_outside(error):
        name = "DATABASE_URL" if settings.database_url else "MODEL_DIR"
        return f"{name}: the database cannot be used: {_in_one_line(error.orig)}"
    if is_outside(error):
        name = "QUEUE_URL" if settings.queue_url else "MODEL_DIR"
        return f"{name}: the queue cannot be used: {_in_one_line(error)}"
    if isinstance(error, OSError):
        folder = settings.model_dir.absolute()
        below = error.filename and Path(str(error.filename)).absolute().is_relative_to(folder)
        return f"{'MODEL_DIR: ' if below else ''}{_in_one_line(error)}"
    return None


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split())


def _settings() -> Settings:
    settings = load_settings()
    logging.basicConfig(level=settings.log_level, format="%(levelname)s %(message)s")
    return settings


def _fail(message: str) -> typer.Exit:
    _err.print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


def _say_wrong(what: str, error: Exception) -> None:
    _err.print(f"[red]wrong {what}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


@app.command()
def serve() -> None:
    """Serve, and work: the server and a worker together, until stopped."""
    settings = _settings()
    settings.check_exposure()
    from ml_backend.worker.supervisor import die_with_parent

    _say_what_is_missing(settings, _checked_device(settings))
    _migrate(settings)
    _check_port(settings)
    commands = {
        "server": [
            *(sys.executable, "-m", "gunicorn", "--config", str(_gunicorn_config())),
            "ml_backend.http.app:create_app()",
        ],
        "worker": [sys.executable, "-m", "ml_backend.cli", "worker", "--checked"],
    }
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        for process in running.values():
            process.terminate()

    def start(name: str) -> subprocess.Popen[bytes]:
        # Killed as we may be, neither is left behind on the port or in the queue.
        return subprocess.Popen(commands[name], preexec_fn=die_with_parent)

    running = {name: start(name) for name in commands}
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    while not stopping:
        time.sleep(0.5)
        if stopping:
            # What has ended by now was told to.
            break
        if (code := running["server"].poll()) is not None:
            running["worker"].terminate()
            running["worker"].wait()
            raise typer.Exit(code)
        if (code := running["worker"].poll()) is not None:
            _err.print(f"the worker ended (status {code}); it is started again")
            time.sleep(1)
            if not stopping:
                running["worker"] = start("worker")
    for process in running.values():
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)
        process.kill()


@app.command()
def worker(
    checked: Annotated[
        bool, typer.Option("--checked", hidden=True, help="`serve` has checked the settings.")
    ] = False,
) -> None:
    """Work: take jobs from the queue, start trainings when they are due."""
    from ml_backend.backend import Backend

    settings = _settings()
    if not checked:
        # It imports torch, which a worker else does without.
        _checked_device(settings)
    Backend(settings).worker().run()


@app.command()
def connect(
    project: Annotated[int, typer.Option("--project", "-p", help="The project's id.")],
    url: Annotated[
        str | None,
        typer.Option(
            help="This backend's address as Label Studio reaches it; by default the one that the "
            "project was connected with, or else HOST and PORT."
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Connect a project, or repair its connection. Doing it again changes nothing."""
    from ml_backend.label_studio.client import LabelStudioError
    from ml_backend.label_studio.label_config import LabelConfigError
    from ml_backend.projects.connect import connect as connect_project

    settings, backend = _backend()
    client = backend.label_studios.default()
    if client is None:
        raise _fail(
            "connecting needs LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY (Label Studio shows the "
            "token under Account & Settings)"
        )
    try:
        done = connect_project(client, project, url, settings, backend.database, backend.ingest)
    except (LabelStudioError, LabelConfigError) as error:
        raise _fail(str(error)) from None
    if as_json:
        _print_json({"project": done.project, "version": done.version, "steps": done.steps})
        return
    for step in done.steps:
        _out.print(f"[green]✓[/] {escape(step)}")
    _out.print(f"Project {project} is connected. `ml-backend doctor -p {project}` checks it.")


@app.command()
def doctor(
    project: Annotated[
        int | None, typer.Option("--project", "-p", help="The project to look at.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Look at everything that must be right, and say what to do where it is not."""
    from ml_backend.doctor.doctor import Doctor

    settings, backend = _backend()
    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}
    findings = []
    doctor = Doctor(settings, backend.database, backend.registry, backend.label_studios)
    for finding in doctor.examine(project):
        findings.append(finding)
        if not as_json:
            _out.print(
                f"{marks[finding.status]} {finding.what}: {escape(finding.detail)}",
                soft_wrap=True,
                highlight=False,
            )
            if finding.remedy:
                _out.print(f"  → {escape(finding.remedy)}", soft_wrap=True, highlight=False)
    if as_json:
        _print_json(
            [
                {"what": f.what, "status": f.status, "detail": f.detail, "remedy": f.remedy}
                for f in findings
            ]
        )
    if any(f.status == "error" for f in findings):
        raise typer.Exit(1)


@app.command()
def train(
    project: _Project,
    wait: Annotated[bool, typer.Option(help="Wait for its end, showing progress.")] = False,
    as_json: _Json = False,
) -> None:
    """Start a training at once."""
    _, backend = _backend()
    row = _find(backend, project)
    asked = backend.jobs.consider_training(row.id, trigger="command", forced=True)
    if asked.enqueue:
        backend.tasks.put("train", asked.job)
    job = backend.jobs.get(asked.job)
    if wait and asked.state != "refused":
        job = _wait(backend, asked.job)
    assert job is not None
    if as_json:
        _print_json(_job_as_dict(job))
    else:
        reason = asked.reason if not wait else job.reason
        _out.print(f"job {job.id}: {job.state}: {escape(reason)}", soft_wrap=True, highlight=False)
    if job.state in {"refused", "failed"}:
        raise typer.Exit(1)


@app.command()
def autolabel(
    project: _Project,
    wait: Annotated[bool, typer.Option(help="Wait for its end, showing progress.")] = True,
    as_json: _Json = False,
) -> None:
    """Predict every task without an annotation; goes on by itself where it was interrupted."""
    _, backend = _backend()
    row = _find(backend, project)
    client = backend.label_studios.client(row)
    if client is None:
        raise _fail(
            "predictions cannot be imported without LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY "
            "(Label Studio shows the token under Account & Settings)"
        )
    # The job would wait for a Label Studio that fails; who asks hears of it now.
    client.project(row.label_studio_id)
    asked = backend.jobs.consider_autolabel(row.id, trigger="command", forced=True)
    if asked.enqueue:
        backend.tasks.put("autolabel", asked.job)
    job = _wait(backend, asked.job) if wait else backend.jobs.get(asked.job)
    if as_json:
        _print_json(_job_as_dict(job))
    else:
        _out.print(
            f"job {job.id}: {job.state}: {escape(job.reason)}", soft_wrap=True, highlight=False
        )
    if job.state in {"refused", "failed"}:
        raise typer.Exit(1)


@app.command()
def status(as_json: _Json = False) -> None:
    """Show projects, live versions, what the next labels are worth, and jobs with their reasons."""
    settings, backend = _backend()
    with backend.database.reading() as session:
        projects = session.scalars(select(Project).order_by(Project.id)).all()
        jobs = {
            p.id: session.scalars(
                select(Job)
                .where(
                    Job.id.in_(
                        select(_rank.c.id).where(_rank.c.project_id == p.id, _rank.c.rank <= 3)
                    )
                )
                .order_by(Job.id.desc())
            ).all()
            for p in projects
        }
    cards = {p.id: {v.name: v.card for v in backend.versions.all(p.id)} for p in projects}
    audits = {p.id: backend.audits.summary(p.id) for p in projects}
    worth = {
        p.id: _worth(settings, list(cards[p.id].values()), audits[p.id], p.live_version)
        for p in projects
    }
    if as_json:
        _print_json(
            [
                {
                    "project": p.key,
                    "title": p.title,
                    "live_version": p.live_version,
                    "heard_at": p.heard_at,
                    "metrics": cards[p.id].get(p.live_version or "", {}).get("metrics"),
                    "audits": summary.as_dict() if (summary := audits[p.id]) else None,
                    "worth": dataclasses.asdict(worth[p.id]),
                    "jobs": [_job_as_dict(job) for job in jobs[p.id]],
                }
                for p in projects
            ]
        )
        return
    if not projects:
        _out.print("No project yet: `ml-backend connect --project ID` connects one.")
        return
    for p in projects:
        card = cards[p.id].get(p.live_version or "")
        quality = f", AP50 {_quality(card)}" if card else ""
        _out.print(f"[bold]{escape(p.title or 'project')}[/] ({p.key})", highlight=False)
        _out.print(f"  live: {escape(p.version)}{quality}", highlight=False)
        if summary := audits[p.id]:
            for line in summary.in_words():
                _out.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
        if cards[p.id]:
            _out.print(f"  {escape(worth[p.id].words)}", highlight=False, soft_wrap=True)
        for job in jobs[p.id]:
            percent = f" {job.progress:.0%}" if job.state == "running" else ""
            _out.print(
                f"  {job.kind} {job.id}: [bold]{job.state}[/]{percent}: {escape(job.reason)}",
                highlight=False,
                soft_wrap=True,
            )


@app.command()
def versions(project: _Project, as_json: _Json = False) -> None:
    """List a project's model versions, newest first."""
    _, backend = _backend()
    rows = backend.versions.all(_find(backend, project).id)
    if as_json:
        _print_json(
            [
                {"version": v.name, "state": v.state, "reason": v.reason, "card": v.card}
                for v in rows
            ]
        )
        return
    table = Table(Column("version", overflow="fold"), "state", "tasks", "AP50", "reason")
    for v in rows:
        cells = (v.name, v.state, str(v.card["data"]["tasks"]), _quality(v.card), v.reason)
        table.add_row(*map(escape, cells))
    _out.print(table)


@app.command()
def promote(
    project: _Project,
    version: Annotated[str, typer.Argument(help="The version.")],
    as_json: _Json = False,
) -> None:
    """Make a version live."""
    _, backend = _backend()
    row = _find(backend, project)
    try:
        backend.versions.promote(row.id, version, "promoted on request")
    except VersionMissing as error:
        raise _fail(str(error)) from None
    backend.tasks.put("in step", row.id)
    if as_json:
        _print_json({"project": row.key, "live_version": version})
        return
    _out.print(f"{escape(version)} is live")


@app.command()
def rollback(
    project: _Project,
    to: Annotated[
        str | None, typer.Option(help="The version to go back to; the previous one by default.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Go back to an earlier version at once; what was live is not promoted again by itself."""
    _, backend = _backend()
    row = _find(backend, project)
    try:
        version = backend.versions.rollback(row.id, to)
    except VersionMissing as error:
        raise _fail(str(error)) from None
    backend.tasks.put("in step", row.id)
    if as_json:
        _print_json({"project": row.key, "live_version": version})
        return
    _out.print(f"{escape(version)} is live again")


@app.command()
def simulate(
    dataset: Annotated[
        Path, typer.Argument(help="Labelled images: COCO, Pascal VOC, YOLO, or an export.")
    ],
    strategies: Annotated[
        str, typer.Option(help="What is asked next: diverse, uncertainty, random.")
    ] = "diverse,random",
    seeds: Annotated[str, typer.Option(help="One campaign of each strategy for each.")] = "0",
    prices: Annotated[str, typer.Option(help="Seconds that drawing a box takes.")] = "7,27.6",
    story: Annotated[
        bool, typer.Option(help="Also one round after the first 55 images, as in the story.")
    ] = True,
    stop_after: Annotated[int | None, typer.Option(help="Images to label; all by default.")] = None,
    picture: Annotated[Path, typer.Option(help="Receives the curves.")] = Path("simulation.png"),
    as_json: _Json = False,
) -> None:
    """Run whole campaigns on labelled images, and count what people would have saved.

    The settings are those of a live project: ML_BACKEND_PRESET, _WEIGHTS, _TRAIN_EVERY,
    _TRAIN_GROWTH, _TRAIN_BUDGET and the rest. Trainings take all cores unless
    ML_BACKEND_TRAIN_THREADS says otherwise.
    """
    settings = _settings()
    _checked_device(settings)
    from ml_backend.datasets.datasets import DatasetError, read_dataset
    from ml_backend.simulation.chart import check_picture, draw_campaigns
    from ml_backend.simulation.report import (
        Plan,
        as_dict,
        curves,
        run,
        summary_table,
        usable,
    )

    try:
        plan = Plan(
            strategies=tuple(strategies.split(",")),
            seeds=_numbers("seeds", seeds, int),
            prices=_numbers("prices", prices, float),
            story=story,
            stop_after=stop_after,
        )
        check_picture(picture)
    except ValueError as error:
        _say_wrong("option", error)
        raise typer.Exit(2) from None
    campaigns = []
    interrupted = False
    try:
        data = read_dataset(dataset)
        with Progress(console=_err) as progress:
            bar = progress.add_task("", total=1.0)

            def tell(fraction: float, words: str) -> None:
                progress.update(bar, completed=fraction, description=escape(words))

            data = usable(data, settings, tell)
            for campaign in run(plan, settings, data, tell):
                campaigns.append(campaign)
    except DatasetError as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        interrupted = True
        _err.print(f"interrupted: {len(campaigns)} campaigns are done", highlight=False)
        if not campaigns:
            raise typer.Exit(130) from None
    if as_json:
        _print_json(as_dict(plan, settings, data, campaigns))
    else:
        for reason, count in data.left_out.items():
            _err.print(f"left out: {count} × {escape(reason)}", soft_wrap=True, highlight=False)
        _out.print(summary_table(plan, campaigns))
        for line in curves(campaigns):
            _out.print(escape(line), soft_wrap=True, highlight=False)
    try:
        draw_campaigns(campaigns, f"{dataset.name}: {len(data.samples)} images", picture)
    except OSError as error:
        raise _fail(f"the picture {picture} cannot be written: {error}") from None
    if not as_json:
        _out.print(f"The curves are in {escape(str(picture))}.", soft_wrap=True)
    if interrupted:
        raise typer.Exit(130)


def _numbers(option: str, text: str, kind: type[_Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option}: {text!r} must be numbers with commas between them") from None


def _backend() -> tuple[Settings, Any]:
    from ml_backend.backend import Backend

    settings = _settings()
    return settings, Backend(settings)


def _find(backend: Any, name: str) -> Project:
    from ml_backend.label_studio.events import InvalidEvent
    from ml_backend.projects.find import ProjectNotFound, find_project

    try:
        return find_project(backend.database, name)
    except ProjectNotFound as error:
        raise _fail(str(error)) from None
    except InvalidEvent as error:
        _say_wrong("option", error)
        raise typer.Exit(2) from None


def _wait(backend: Any, job_id: int) -> Job:
    begun, told = time.monotonic(), False
    try:
        with Progress(console=_err) as progress:
            bar = progress.add_task("waiting", total=1.0)
            while True:
                job: Job = backend.jobs.get(job_id)
                if job.state == "queued" and not told and time.monotonic() > begun + _NOBODY:
                    told = True
                    progress.console.print(
                        "no worker has taken it yet: does `ml-backend serve` or `ml-backend "
                        "worker` run on this MODEL_DIR?",
                        soft_wrap=True,
                    )
                progress.update(bar, completed=job.progress, description=escape(job.reason[:70]))
                if job.state in {"done", "failed", "refused"}:
                    return job
                time.sleep(1)
    except KeyboardInterrupt:
        _err.print(f"job {job_id} goes on without you: `ml-backend status` shows how far it is")
        raise typer.Exit(130) from None


def _job_as_dict(job: Job) -> dict[str, Any]:
    return {
        "job": job.id,
        "kind": job.kind,
        "state": job.state,
        "reason": job.reason,
        "progress": round(job.progress, 3),
        "trigger": job.trigger,
        "version": job.version,
    }


def _worth(
    settings: Settings, cards: list[dict[str, Any]], audits: Summary | None, live: str | None
) -> Worth:
    """What a project's next labels are worth; cards of its versions, newest first."""
    from ml_backend.audits.label_value import Version, more_images, worth_of

    versions = [v for card in reversed(cards) if (v := Version.of(card)) is not None]
    made_of_live = audits.versions.get(live) if audits is not None and live is not None else None
    return worth_of(
        versions,
        more=more_images(versions, every=settings.train_every, growth=settings.train_growth),
        untouched=made_of_live.boxes.accepted_share if made_of_live is not None else None,
    )


def _quality(card: dict[str, Any]) -> str:
    metrics = card["metrics"]
    interval = metrics["map50_interval"]
    return f"{metrics['map50']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def _gunicorn_config() -> Path:
    for folder in (Path(__file__).parent / "config", Path(__file__).parents[1] / "config"):
        if (folder / "gunicorn.conf.py").is_file():
            return folder / "gunicorn.conf.py"
    raise _fail("gunicorn.conf.py is missing from the installation: install the package again")


def _checked_device(settings: Settings) -> str:
    """The device in words; what would fail with the first training fails now."""
    from ml_backend.detection.device import DeviceError, describe_device, resolve_device
    from ml_backend.detection.presets import check
    from ml_backend.remedies import with_remedy

    try:
        device = resolve_device(settings.device)
        check(settings.preset, settings.weights, device)
    except DeviceError as error:
        raise _fail(with_remedy(error)) from None
    except ValueError as error:
        raise SettingsError(with_remedy(error)) from None
    return ", ".join(map(str, describe_device(device).values()))


def _check_port(settings: Settings) -> None:
    """Says in one line that the port is taken, by another server of ours for example."""
    where = settings.host, settings.port
    # One that was killed a moment ago may hold it for as long as its processes need to see that.
    until = time.monotonic() + _PORT_WITHIN
    while True:
        try:
            family, kind, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return
        except OSError as error:
            if time.monotonic() > until:
                raise SettingsError(
                    f"HOST and PORT: {settings.host}:{settings.port} cannot be listened on: "
                    f"{error.strerror}; stop what does, or set another PORT"
                ) from error
        time.sleep(0.2)


def _migrate(settings: Settings) -> None:
    from filelock import Timeout

    from ml_backend.backend import Backend
    from ml_backend.worker.worker import turn

    backend = Backend(settings)
    backend.database.close()
    # Another server on the folder may train: what it is writing is not left over.
    with suppress(Timeout), turn(settings, "train"):
        backend.registry.sweep()


def _say_what_is_missing(settings: Settings, device: str) -> None:
    _err.print(f"ML backend on {escape(settings.own_url)}, {escape(device)}", highlight=False)
    if settings.label_studio_url is None or settings.label_studio_api_key is None:
        _err.print(
            "[yellow]LABEL_STUDIO_URL or LABEL_STUDIO_API_KEY is not set:[/] uploaded images "
            "cannot be read, and `connect` cannot be used. Set both to begin.",
            soft_wrap=True,
        )
    os.environ.setdefault("MODEL_DIR", str(settings.model_dir.absolute()))


if __name__ == "__main__":
    main()
