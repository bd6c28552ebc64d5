"""Take the README's picture: Label Studio's labelling page with boxes that this backend predicted.

Run by hand: `python -m tests.screenshot`. It starts the demo, waits for its first training, opens
a task that nobody annotated in a headless Chromium, and saves what the browser shows. The Debian
packages `chromium` and `chromium-driver` must be installed.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / ".github/labelling.png"
WINDOW = (1440, 1000)
"""Width and height of the browser's window, in pixels: large enough to read the boxes' labels."""
WIDTH = 1200
"""Width of the picture, in pixels."""
BOXES = 5
"""Boxes that a task must have to be chosen."""
BACKGROUNDS = {"Circle": "#e4572e", "Square": "#2e86ab", "Triangle": "#8f3fb0"}
"""Colours of the labels, so that each has one of its own."""
COLOURS = 256
"""Size of the picture's palette: it keeps the file small, and nobody sees the difference."""
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    f"--window-size={WINDOW[0]},{WINDOW[1]}",
)
# Label Studio keeps a user's display settings in the browser.
_SHOW_LABELS = 'localStorage.setItem("labelStudio:settings", \'{"showLabels": true}\')'


def main(
    label_studio: Annotated[Path, typer.Option(help="The `label-studio` program.")] = ROOT
    / ".venv-label-studio/bin/label-studio",
    data: Annotated[Path, typer.Option(help="The demo's folder.")] = ROOT / "demo-data",
    picture: Annotated[Path, typer.Option(help="The file to write.")] = PICTURE,
    task: Annotated[int, typer.Option(help="The task to show; 0 chooses one.")] = 0,
    within: Annotated[float, typer.Option(help="Seconds to wait for the training.")] = 1800,
) -> None:
    """Write the picture, from a demo that is started for it and ended afterwards."""
    with _demo(label_studio, data) as demo:
        state = _wait_for_state(data / "demo.json", demo, within)
        token = {"Authorization": f"Token {state['token']}"}
        url = f"http://127.0.0.1:{state['ports'][0]}"
        shown = _wait_for_predictions(url, state["project"], token, demo, within)
        number = task or max(shown, key=lambda each: _surest(shown[each]))
        _colour(f"{url}/api/projects/{state['project']}/", token)
        with _browser() as browser:
            _log_in(browser, url, state["password"])
            browser.execute_script(_SHOW_LABELS)
            browser.get(f"{url}/projects/{state['project']}/data?task={number}")
            content = _labelling_page(browser)
    picture.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image = image.resize((WIDTH, round(image.height * WIDTH / image.width)))
    image.quantize(COLOURS).save(picture, optimize=True)
    typer.echo(f"{picture}: task {number}, {image.size}, {picture.stat().st_size} bytes")


def _surest(regions: list[dict[str, Any]]) -> float:
    """Return the lowest score of a task's boxes; 0 where they are few or a label is missing."""
    labels = {label for region in regions for label in region["value"]["rectanglelabels"]}
    if len(regions) < BOXES or labels != set(BACKGROUNDS):
        return 0.0
    return min(float(region["score"]) for region in regions)


def _colour(project: str, token: dict[str, str]) -> None:
    config = requests.get(project, headers=token, timeout=60).json()["label_config"]
    for label, colour in BACKGROUNDS.items():
        config = config.replace(f'value="{label}"/>', f'value="{label}" background="{colour}"/>')
    requests.patch(
        project, json={"label_config": config}, headers=token, timeout=60
    ).raise_for_status()


@contextmanager
def _demo(label_studio: Path, data: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "ml_backend.demo", "--label-studio", str(label_studio)]
    with subprocess.Popen([*command, "--data", str(data)]) as process:
        try:
            yield process
        finally:
            process.terminate()


def _wait_for_state(file: Path, demo: subprocess.Popen[bytes], within: float) -> dict[str, Any]:
    """Wait until the demo has made its project; return its login, ports and project."""

    def state() -> dict[str, Any] | None:
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found if "project" in found else None

    return _wait(state, demo, within)  # type: ignore[no-any-return]


def _wait_for_predictions(
    url: str, project: int, token: dict[str, str], demo: subprocess.Popen[bytes], within: float
) -> dict[int, list[Any]]:
    """Wait for predictions with boxes; return the regions of each task that nobody annotated."""

    def predictions() -> dict[int, list[Any]]:
        answer = requests.get(
            f"{url}/api/predictions/", params={"project": project}, headers=token, timeout=60
        )
        found = answer.json() if answer.ok else []
        return {p["task"]: p["result"] for p in found if p["result"]}

    return _wait(predictions, demo, within)  # type: ignore[no-any-return]


def _wait(condition: Any, demo: subprocess.Popen[bytes], within: float) -> Any:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if demo.poll() is not None:
            raise typer.BadParameter("the demo ended: its output above says why")
        try:
            if found := condition():
                return found
        except requests.RequestException:
            """Label Studio is not up yet."""
        time.sleep(5)
    raise typer.BadParameter(f"no predictions after {within:g} s: see the demo's folder")


@contextmanager
def _browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield browser
        finally:
            browser.quit()


def _log_in(browser: WebDriver, url: str, password: str) -> None:
    browser.get(f"{url}/user/login")
    browser.find_element(By.NAME, "email").send_keys("demo@example.com")
    browser.find_element(By.NAME, "password").send_keys(password)
    browser.find_element(By.CSS_SELECTOR, "form [type=submit]").click()
    WebDriverWait(browser, 60).until(lambda page: "/user/login" not in page.current_url)


def _labelling_page(browser: WebDriver) -> bytes:
    """Wait until the task's image and its regions are drawn; return a PNG of the page."""
    WebDriverWait(browser, 120).until(
        lambda page: page.find_elements(By.CSS_SELECTOR, ".konvajs-content canvas")
    )
    # Nothing on the page tells that its canvas is drawn.
    time.sleep(5)
    return browser.get_screenshot_as_png()


if __name__ == "__main__":
    typer.run(main)
