"""Test the audits: what became of predictions in a real Label Studio, and the time they saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from sqlalchemy import select

from ml_backend.acquisition.control_group import is_control
from ml_backend.audits.audits import AWAY
from ml_backend.audits.compare import Boxes
from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer, free_port
from ml_backend.demo.project import LABEL_CONFIG, create_project
from ml_backend.demo.shapes import generate
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.projects.reconcile import reconcile
from ml_backend.reasons import Code, reason
from ml_backend.settings import load_settings
from ml_backend.store.tables import Annotation, Audit, Project
from ml_backend.training.dataset import build_dataset
from ml_backend.training.promotion import Verdict
from ml_backend.wording import words
from ml_backend.wording.audits import summary_lines
from tests.conftest import RunningBackend, ask, record_version, wait_for

PAIRS = """<View>
  <Image name="image" value="$image"/>
  <Rectangle name="box" toName="image"/>
  <Labels name="label" toName="image"><Label value="Circle"/><Label value="Square"/></Labels>
</View>"""
CARD: dict[str, Any] = {
    "data": {"tasks": 5, "boxes": {"Circle": 5}},
    "metrics": {"map50": 0.5, "map50_interval": {"low": 0.4, "high": 0.6}},
}
Region = dict[str, Any]


def box(number: str, label: str = "Circle", x: float = 10.0, **fields: Any) -> Region:
    """Makes a region of `LABEL_CONFIG`."""
    return {
        "id": number,
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 128,
        "original_height": 96,
        "image_rotation": 0,
        "value": {
            "x": x,
            "y": 20.0,
            "width": 30.0,
            "height": 25.0,
            "rotation": 0,
            "rectanglelabels": [label],
        },
        **fields,
    }


def pair(number: str, label: str = "Circle", x: float = 10.0) -> list[Region]:
    """Makes the two results of a region of `PAIRS`."""
    one = box(number, x=x) | {"type": "rectangle", "from_name": "box"}
    del one["value"]["rectanglelabels"]
    other = copy.deepcopy(one) | {"type": "labels", "from_name": "label"}
    other["value"]["labels"] = [label]
    return [one, other]


class Site:
    """Holds a project in a real Label Studio, and a backend that does not run."""

    def __init__(
        self,
        server: LabelStudioServer,
        folder: Path,
        tasks: int,
        *,
        label_config: str = LABEL_CONFIG,
        **settings: str,
    ) -> None:
        self.server = server
        images = generate(tasks, seed=21, width=128, height=96)
        self.project, found = create_project(
            server, "Audits", label_config, {i.name: i.encoded() for i in images}
        )
        self.tasks = list(found.values())
        self.settings = {
            "MODEL_DIR": str(folder),
            "LABEL_STUDIO_URL": server.url,
            "LABEL_STUDIO_API_KEY": server.login.token,
            **settings,
        }
        self.backend = Backend(load_settings(self.settings))
        self.client = LabelStudioClient(server.url, server.login.token)
        info = self.client.project(self.project)
        self.key = info.key
        self.row = self.backend.ingest.introduce(
            info.key, info.id, label_config=info.label_config
        ).id

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Sends a request to Label Studio's API; answers its JSON."""
        return ask(self.server, method, path, body)

    def predict(self, task: int, result: list[Region], version: str = "v1") -> int:
        """Puts a prediction into Label Studio; answers its number."""
        body = {"task": task, "result": result, "score": 0.5, "model_version": version}
        return int(self.call("POST", "/api/predictions/", body)["id"])

    def annotate(self, task: int, result: list[Region], **fields: Any) -> int:
        """Submits an annotation; answers its number."""
        body = {"result": result, **fields}
        return int(self.call("POST", f"/api/tasks/{task}/annotations/", body)["id"])

    def make_version(self, name: str) -> None:
        """Enters a live version."""
        verdict = Verdict(promote=True, reason=reason(Code.FIRST_VERSION, ap50=0.5))
        with self.backend.database.reading() as session:
            live = session.get_one(Project, self.row).live_version
        record_version(
            self.backend.versions,
            self.backend.database,
            self.row,
            name,
            CARD,
            verdict,
            parent=live,
            revision=0,
        )

    def read_back(self) -> None:
        """Reads back from Label Studio."""
        with self.backend.database.reading() as session:
            project = session.get_one(Project, self.row)
        reconcile(project, self.client, self.backend.database, self.backend.ingest)

    def count(self) -> None:
        """Reads back from Label Studio, and updates the audits as the worker does."""
        self.read_back()
        assert self.backend.audits.update(self.row) is None

    def learned(self) -> list[int]:
        """Lists the tasks that a training would learn from."""
        with self.backend.database.reading() as session:
            project = session.get_one(Project, self.row)
        with TemporaryDirectory() as folder:
            dataset = build_dataset(
                project,
                parse_label_config(project.label_config),
                self.backend.database,
                self.backend.label_studios.images(project),
                Path(folder),
                max_pixels=10**6,
                random_share=0.1,
                store_sides=lambda rows: None,
                on_progress=lambda fraction, why: None,
            )
        return sorted(dataset.task_of.values())

    def audit(self, annotation: int) -> Audit | None:
        """Reads the audit of an annotation."""
        with self.backend.database.reading() as session:
            return session.scalar(
                select(Audit)
                .join(Annotation, Annotation.id == Audit.annotation_id)
                .where(Annotation.label_studio_id == annotation)
            )

    def boxes(self, annotation: int) -> Boxes:
        """Counts what became of the predicted boxes of an annotation."""
        audit = self.audit(annotation)
        assert audit is not None
        return Boxes(audit.accepted, audit.moved, audit.relabelled, audit.deleted, audit.added)

    def version(self, annotation: int) -> str | None:
        """Reads the version that an annotation began with."""
        audit = self.audit(annotation)
        assert audit is not None
        return audit.version


def test_update_annotation_of_a_prediction_counts_boxes_by_what_became_of_them(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    site = Site(label_studio, tmp_path, 4)
    site.make_version("v1")
    first, second, third, fourth = site.tasks
    shown = [box(f"p{i}", score=0.9) for i in range(6)]
    prediction = site.predict(first, shown)
    # As a program sends it: no region says where it comes from.
    annotation = site.annotate(
        first,
        [
            box("p0"),
            box("p1", x=10.00001),
            box("p2", x=14.0),
            box("p3", "Square"),
            box("p4", "Square", x=40.0),
            box("new"),
        ],
        parent_prediction=prediction,
        lead_time=12.0,
    )
    foreign = site.annotate(
        second, [box("q0")], parent_prediction=site.predict(second, [box("q0")], "theirs")
    )
    unaided = site.annotate(third, [box("r0", origin="manual"), box("r1")])
    skipped = site.annotate(fourth, [], was_cancelled=True)
    site.count()
    assert site.boxes(annotation) == Boxes(2, 1, 2, 1, 1)
    assert site.version(annotation) == "v1"
    assert site.boxes(foreign) == Boxes(accepted=1)
    assert site.version(foreign) == "theirs"
    assert site.boxes(unaided) == Boxes(added=2)
    assert site.version(unaided) is None
    assert site.audit(skipped) is None

    # Only our versions are summed up, and the version's card holds the sums.
    summary = site.backend.audits.summary(site.row)
    assert summary is not None
    assert summary.ours.boxes == Boxes(2, 1, 2, 1, 1)
    assert set(summary.versions) == {"v1"}
    (version,) = site.backend.versions.all(site.row)
    assert version.card["metrics"] == CARD["metrics"]
    assert version.card["audits"]["boxes"]["accepted"] == 2
    assert version.card["audits"]["accepted_share"] == pytest.approx(2 / 6)

    # Changed, it is counted anew; the card follows.
    site.call("PATCH", f"/api/annotations/{annotation}/", {"result": [*map(box, ("p0", "p5"))]})
    site.count()
    assert site.boxes(annotation) == Boxes(accepted=2, deleted=4)
    (version,) = site.backend.versions.all(site.row)
    assert version.card["audits"]["boxes"]["deleted"] == 4

    # Once the prediction is gone, the regions' `origin` decides; the version stays known.
    site.call("DELETE", f"/api/predictions/{prediction}/")
    changed = [
        box("p0", origin="prediction"),
        box("p1", x=50.0, origin="prediction-changed"),
        box("new", origin="manual"),
    ]
    site.call("PATCH", f"/api/annotations/{annotation}/", {"result": changed})
    site.count()
    assert site.boxes(annotation) == Boxes(accepted=1, moved=1, deleted=4, added=1)
    assert site.version(annotation) == "v1"

    # Deleted, it counts no longer.
    site.call("DELETE", f"/api/annotations/{annotation}/")
    site.count()
    assert site.backend.audits.summary(site.row) is None


def test_update_prediction_already_deleted_counts_by_the_origin_of_regions(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    site = Site(label_studio, tmp_path, 1)
    site.make_version("v1")
    prediction = site.predict(site.tasks[0], [box("p0"), box("p1"), box("p2")])
    annotation = site.annotate(
        site.tasks[0],
        [box("p0", origin="prediction"), box("p1", x=33.0, origin="prediction-changed")],
        parent_prediction=prediction,
    )
    site.read_back()
    site.call("DELETE", f"/api/predictions/{prediction}/")
    assert site.backend.audits.update(site.row) is None
    # The third box was deleted, which no region shows.
    assert site.boxes(annotation) == Boxes(accepted=1, moved=1)
    assert site.version(annotation) is None


def test_update_predictions_accepted_in_bulk_count_without_a_time(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    site = Site(label_studio, tmp_path, 3)
    site.make_version("v1")
    for number, task in enumerate(site.tasks):
        site.predict(task, [box(f"p{i}") for i in range(number)])
    site.call(
        "POST",
        f"/api/dm/actions?id=predictions_to_annotations&project={site.project}",
        {"selectedItems": {"all": True, "excluded": []}, "project": str(site.project)},
    )
    site.count()
    summary = site.backend.audits.summary(site.row)
    assert summary is not None
    assert summary.ours.annotations == summary.ours.in_bulk == 3
    assert summary.ours.boxes == Boxes(accepted=3)
    # No time is known of these annotations, so that no saved time is claimed.
    assert summary.ours.hours_saved is None
    assert len(summary_lines(summary)) == 1
    # A person has not confirmed that the first image is empty: it is not learned from. Once
    # somebody submits it as empty, it is.
    assert site.learned() == site.tasks[1:]
    empty = site.predict(site.tasks[0], [])
    site.annotate(site.tasks[0], [], parent_prediction=empty, lead_time=4.0)
    site.count()
    assert site.learned() == site.tasks


def test_summary_chosen_tasks_before_the_first_version_are_a_baseline(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    site = Site(label_studio, tmp_path, 6)
    drawn = [box("a", origin="manual"), box("b", origin="manual")]
    # As Label Studio's page sends it: a task that was chosen holds a prediction without boxes.
    for task in site.tasks[:5]:
        asked = site.predict(task, [], "untrained")
        site.annotate(task, drawn, parent_prediction=asked, lead_time=34.6)
    site.make_version("v1")
    shown = site.predict(site.tasks[5], drawn)
    site.annotate(site.tasks[5], drawn, parent_prediction=shown, lead_time=4.6)
    site.count()
    summary = site.backend.audits.summary(site.row)
    assert summary is not None
    assert summary.early is not None
    assert (summary.early.annotations, summary.early.mean) == (5, 34.6)
    assert summary.ours.hours_saved == pytest.approx(30.0 / 3600)
    assert "5 of them from before the first version" in words(summary.against)


def test_update_rectangle_and_its_label_count_as_one_box(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    site = Site(label_studio, tmp_path, 1, label_config=PAIRS)
    site.make_version("v1")
    shown = [*pair("p0"), *pair("p1"), *pair("p2"), *pair("p3")]
    annotation = site.annotate(
        site.tasks[0],
        [*pair("p0"), *pair("p1", x=12.0), *pair("p2", "Square"), *pair("new")],
        parent_prediction=site.predict(site.tasks[0], shown),
    )
    site.count()
    assert site.boxes(annotation) == Boxes(1, 1, 1, 1, 1)


def test_is_control_larger_share_keeps_the_tasks_of_a_smaller_one() -> None:
    tenth = {task for task in range(10_000) if is_control(task, 0.1)}
    assert 900 < len(tenth) < 1100
    assert tenth < {task for task in range(10_000) if is_control(task, 0.2)}
    assert not any(is_control(task, 0.0) for task in range(1000))
    assert all(is_control(task, 1.0) for task in range(1000))


def test_summary_enough_annotations_without_boxes_measures_hours_against_them(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    site = Site(label_studio, tmp_path, 40, ML_BACKEND_BLIND_SHARE="0.5")
    blind = [task for task in site.tasks if is_control(task, 0.5)]
    others = [task for task in site.tasks if not is_control(task, 0.5)]
    assert len(blind) >= 6
    assert len(others) >= 4
    drawn = [box("a", origin="manual"), box("b", origin="manual")]
    three = [box("p0"), box("p1"), box("p2")]

    # Twice what two boxes cost by hand: 2 · (3.3 + 2 · 7.0).
    site.annotate(others[0], drawn, lead_time=34.6)
    site.make_version("v1")
    first = site.annotate(
        others[1], three, parent_prediction=site.predict(others[1], three), lead_time=8.6
    )
    site.count()
    summary = site.backend.audits.summary(site.row)
    assert summary is not None
    # Against the stated costs: 3.3 + 3 · 7.0 - 8.6.
    assert summary.ours.hours_saved == pytest.approx(15.7 / 3600)
    assert "stated costs (3.3 s an image and 7 s a box)" in words(summary.against)
    assert (summary.blind, summary.early and summary.early.mean) == (None, 34.6)

    # Four blind ones and the early one are enough together.
    for task in blind[:4]:
        found = site.annotate(task, drawn, parent_prediction=site.predict(task, []), lead_time=34.6)
        site.count()
        assert (audit := site.audit(found)) is not None
        assert (audit.blind, audit.version) == (True, "v1")
    summary = site.backend.audits.summary(site.row)
    assert summary is not None
    assert summary.ours.hours_saved == pytest.approx((2 * 24.3 - 8.6) / 3600)
    assert "before the first version" in words(summary.against)
    assert summary.ours.boxes == Boxes(accepted=3)

    # Five blind ones are a fair sample by themselves. Somebody left a page open for hours, and in
    # an image nothing was found, though it is not blind.
    site.annotate(blind[4], drawn, parent_prediction=site.predict(blind[4], []), lead_time=34.6)
    site.annotate(
        others[2], three, parent_prediction=site.predict(others[2], three), lead_time=9999.0
    )
    site.annotate(others[3], drawn, parent_prediction=site.predict(others[3], []), lead_time=30.0)
    # A blind task that was opened before it was to be blind is like any other.
    shown = site.predict(blind[5], three)
    site.annotate(blind[5], three, parent_prediction=shown, lead_time=8.6)
    site.count()
    summary = site.backend.audits.summary(site.row)
    assert summary is not None
    assert "5 annotations of tasks that are kept without boxes (34.6 s" in words(summary.against)
    assert summary.blind is not None
    assert summary.blind.per_box == pytest.approx(17.3)
    assert summary.ours.annotations == 4
    assert summary.ours.pace is not None
    # The page left open counts as three times 3.3 + 3 · (7.0 + 1.5).
    assert summary.ours.pace.median == pytest.approx((8.6 + 30.0) / 2)
    assert summary.ours.pace.mean == pytest.approx((8.6 + 86.4 + 30.0 + 8.6) / 4)
    saved = 2 * (24.3 + 24.3 + 17.3 + 24.3) - (8.6 + 86.4 + 30.0 + 8.6)
    assert summary.ours.hours_saved == pytest.approx(saved / 3600)
    assert summary.ours.boxes == Boxes(accepted=9, added=2)
    assert site.boxes(first) == Boxes(accepted=3)
    assert summary_lines(summary)[1].startswith(
        "saved 0.8 minutes (33.4 s an annotation with boxes)"
    )


def test_update_label_studio_away_answers_when_to_ask_again_and_logs_once(
    label_studio: LabelStudioServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(label_studio, tmp_path, 2)
    site.make_version("v1")
    unaided = site.annotate(site.tasks[0], [box("a")])
    aided = site.annotate(
        site.tasks[1], [box("p0")], parent_prediction=site.predict(site.tasks[1], [box("p0")])
    )
    site.read_back()
    away = site.settings | {"LABEL_STUDIO_URL": f"http://127.0.0.1:{free_port()}"}
    audits = Backend(load_settings(away)).audits
    for _ in range(2):
        assert audits.update(site.row) == AWAY
    assert [r.message for r in caplog.records if "cannot be counted yet" in r.message]
    assert sum("cannot be counted yet" in r.message for r in caplog.records) == 1
    # The annotation that began without a prediction was counted.
    assert site.boxes(unaided) == Boxes(added=1)
    assert site.audit(aided) is None
    site.count()
    assert site.boxes(aided) == Boxes(accepted=1)


def test_update_without_a_token_counts_by_the_origin_of_regions(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    site = Site(label_studio, tmp_path, 1)
    annotation = site.annotate(
        site.tasks[0],
        [box("p0", origin="prediction"), box("new", origin="manual")],
        parent_prediction=site.predict(site.tasks[0], [box("p0"), box("p1")]),
    )
    site.read_back()
    assert Backend(load_settings({"MODEL_DIR": str(tmp_path)})).audits.update(site.row) is None
    assert site.boxes(annotation) == Boxes(accepted=1, added=1)


@pytest.fixture
def site_and_server(
    label_studio: LabelStudioServer, tmp_path: Path
) -> Iterator[tuple[Site, RunningBackend]]:
    """Runs a backend for a project with a live version."""
    running = RunningBackend(
        tmp_path, LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.login.token
    )
    site = Site(label_studio, running.model_dir, 2)
    site.make_version("v1")
    site.backend.database.close()
    running.start()
    yield site, running
    running.stop()


def test_worker_annotations_of_predictions_are_counted_and_shown_by_status_versions_and_metrics(
    site_and_server: tuple[Site, RunningBackend],
) -> None:
    site, running = site_and_server
    running.command("connect", "--project", str(site.project), "--url", running.url)
    assert running.json("status")[0]["audits"] is None
    for task in site.tasks:
        prediction = site.predict(task, [box("p0"), box("p1")])
        site.annotate(task, [box("p0"), box("new")], parent_prediction=prediction, lead_time=10.0)

    def both() -> Any:
        audits = running.json("status")[0]["audits"]
        return audits if audits and audits["annotations"] == 2 else None

    audits = wait_for(both, within=60, what="both annotations are counted")
    counts = {"accepted": 2, "moved": 0, "relabelled": 0, "deleted": 2, "added": 2}
    assert audits["boxes"] == audits["versions"]["v1"]["boxes"] == counts
    assert audits["accepted_share"] == 0.5
    # Two annotations of two boxes, against the stated costs: 2 · (3.3 + 14.0 - 10.0).
    assert audits["hours_saved"] == pytest.approx(14.6 / 3600)
    said = running.command("status")
    assert "of 4 predicted boxes in 2 annotations: 2 accepted (50%)" in said
    assert "saved 0.2 minutes (10.0 s an annotation with boxes)" in said
    (version,) = running.json("versions", "--project", str(site.project))
    assert version["card"]["audits"]["boxes"] == counts
    metrics = running.get("/metrics").text
    mark = f'project="{site.key}"'
    assert f'ml_backend_audited_boxes{{outcome="deleted",{mark},version="v1"}} 2.0' in metrics, (
        metrics
    )
    assert f'ml_backend_hours_saved{{{mark},version="v1"}} 0.00405' in metrics
    assert f'ml_backend_lead_time_seconds{{began="boxes",{mark},version="v1"}} 10.0' in metrics
