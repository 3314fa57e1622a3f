"""Ray's dashboard in a real browser, with a real run: who is let in, and what a person finds there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from jobs import STEPS, Cluster, Command, until

from ops.browser import ENTER, Browser, Entry
from ops.conftest import RUN
from ops.grafana_page import draw
from ops.monitoring import dashboard
from ops.pictures import FOLDER, KEPT, LARGEST_BYTES

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]

JOB = f"{RUN}-a1"
DIALOG, TOKEN = "Authentication Token Required", "//input[@type='password']"
WITHOUT = {
    "/api/grafana_health": "Ray's page shows Grafana's plots where Ray was told of a Grafana",
    "/api/prometheus_health": "the same",
    "/api/serve/applications/": "Ray Serve does not run here",
    "/api/v0/platform_events": "of Kubernetes",
}
"""Requests of the page that fail, and why they may."""
WITHOUT_GPU = {"GPU utilisation"}
PICTURED_S = 240.0 if KEPT else 30.0
"""How long the run is watched for its picture, at least."""


@pytest.fixture
def stranger(cluster: Cluster, training: Command, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path)
    try:
        browser.open(cluster.url)
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def inside(cluster: Cluster, training: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser whose user has typed the token, while the run trains."""
    until(lambda: "step 5/" in training.output, training, 240)  # a page reads the log once
    browser = Browser(tmp_path_factory.mktemp("browser"))
    try:
        browser.open(cluster.url)
        browser.wait_for(DIALOG)
        browser.listen()
        browser.console.clear()  # what was refused until now was refused with reason
        browser.type(TOKEN, (cluster.folder / "token").read_text().strip() + ENTER)
        browser.wait_for("Cluster status and autoscaler")
        yield browser
    finally:
        browser.close()


def shows_nothing(browser: Browser, cluster: Cluster) -> bool:
    shown = browser.text() + browser.run("return document.documentElement.outerHTML")
    asked = browser.run("return fetch(arguments[0]).then(answer => answer.status)", f"{cluster.url}/api/jobs/")
    return JOB not in shown and str(cluster.folder) not in shown and asked in (401, 403)


def test_who_has_no_token_sees_the_question_for_it_and_nothing_else(cluster, stranger):
    stranger.wait_for(DIALOG)
    assert shows_nothing(stranger, cluster)
    stranger.open(f"{cluster.url}/#/jobs")
    stranger.wait_for(DIALOG)
    assert shows_nothing(stranger, cluster)


def test_a_wrong_token_is_refused(cluster, stranger):
    stranger.wait_for(DIALOG)
    stranger.type(TOKEN, "0" * 64 + ENTER)
    stranger.wait_for("Invalid authentication token")
    assert shows_nothing(stranger, cluster)


def complaints(browser: Browser) -> list[Entry | str]:
    """Errors on the page, and in the browser's console those that have no good reason."""
    alerts = browser.run("return [...document.querySelectorAll('[role=alert]')].map(box => box.innerText)")
    unexpected = [
        entry
        for entry in browser.listen()
        if entry.level == "SEVERE" and not any(request in entry.message for request in WITHOUT)
    ]
    shown = re.findall(r"Failed to .*|.*Query Error.*|Something went wrong.*", browser.text())
    return [*unexpected, *shown, *(alert for alert in alerts if "Grafana" not in alert)]


def test_the_run_is_listed_as_running(cluster, inside):
    inside.open(f"{cluster.url}/#/jobs")
    inside.wait_for(JOB)
    row = inside.run("return arguments[0].innerText", inside.reference(f"//tr[contains(., '{JOB}')]"))
    assert "RUNNING" in row and f"ray_jobs.train demo --run {RUN}" in row
    assert complaints(inside) == []


def test_the_run_s_page_has_its_metadata_and_its_log_the_progress(cluster, inside):
    inside.resize(1400, 1250)
    inside.open(f"{cluster.url}/#/jobs/{JOB}")
    page = inside.wait_for("User-provided metadata")
    inside.type("//label[text()='Keyword']/following::input[1]", f"step{ENTER}")  # the log's lines with this word
    inside.wait_for("step 1/")
    page = inside.text()
    inside.picture(FOLDER / "dashboard-job.png")

    metadata = json.loads(page[page.index("{", page.index("User-provided metadata")) : page.index("}") + 1])
    assert metadata.pop("commit", "") == cluster.jobs()[JOB]["metadata"].get("commit", "")
    assert re.fullmatch("[0-9a-f]{12}", metadata.pop("config"))
    assert metadata == {
        "run": RUN,
        "run_dir": str(cluster.folder / "runs" / RUN),
        "preset": "demo",
        "step": "0",
        "steps": "2000",
    }
    assert "RUNNING" in page and JOB in page
    steps = [int(step) for step in STEPS.findall(page)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1
    assert complaints(inside) == []


def asked(cluster: Cluster, path: str) -> dict[str, Any]:
    """What the dashboard answers its page, `ray list` and the like."""
    header = {"Authorization": f"Bearer {(cluster.folder / 'token').read_text().strip()}"}
    return requests.get(f"{cluster.url}{path}", headers=header, timeout=30).json()


def test_actors_and_tasks_say_what_they_do(cluster, inside):
    inside.resize(1500, 1750)
    inside.open(f"{cluster.url}/#/actors")
    inside.wait_for("TOTAL")
    inside.type("//label[text()='Page Size']/following::input[1]", f"\ue009a\ue00020{ENTER}")  # all of 10 is selected
    page = inside.wait_for(f"ledger of {RUN}")
    inside.picture(FOLDER / "dashboard-actors.png")
    assert "ingest decode rank 0" in page
    assert "RayTrainWorker" in page and "TrainController" in page  # Ray Train names those
    assert complaints(inside) == []

    inside.open(f"{cluster.url}/#/jobs/{JOB}")
    inside.click("//*[text()='Ray Data Overview']")
    inside.wait_for("ingest rank 0")
    assert complaints(inside) == []
    tasks = {task["name"] for task in asked(cluster, "/api/v0/tasks?detail=1&limit=10000")["data"]["result"]["result"]}
    assert {f"ledger of {RUN}.joined", "MapWorker(ReadRange->MapBatches(ingest decode rank 0)).submit"} <= tasks
    # Which RayTrainWorker is which rank, Ray Train says itself.
    ranks = json.dumps(asked(cluster, "/api/train/v2/runs/v1"))
    assert f'"name": "{RUN}-' in ranks and '"world_rank": 0' in ranks


def test_the_grafana_page_s_queries_make_a_picture_of_the_run(cluster, watched):
    now = time.time()
    (step,) = watched.curves("max(ray_fvlm_step)", now - 900, now)
    time.sleep(max(0.0, PICTURED_S - (now - step.times[0])))
    panels = draw(dashboard(), watched, step.times[0], time.time(), FOLDER / "run.png")
    empty = {title.rpartition(" ")[0] for title, curves in panels.items() if not curves}
    assert empty <= WITHOUT_GPU
    assert len(panels) == len(dashboard()["panels"])


def test_the_pictures_are_small_enough_to_be_kept():
    sizes = {path.name: path.stat().st_size for path in FOLDER.glob("*.png")}
    assert {"dashboard-job.png", "dashboard-actors.png", "run.png"} <= sizes.keys()
    assert max(sizes.values()) < LARGEST_BYTES
