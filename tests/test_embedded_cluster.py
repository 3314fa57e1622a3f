"""The cluster that a command starts for itself: what is in the shell or in the way of starting it changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVER = """
import os, ray
from ray_jobs.cluster import connect
with connect(num_cpus=1, object_store_bytes=80 << 20):
    print("answer", ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60))
"""


@pytest.mark.timeout(240)
def test_uv_run_from_any_folder_starts_no_second_environment(tmp_path):
    """Ray knows `uv run` by the command lines of its parents, and this is one."""
    (tmp_path / "uv").symlink_to(sys.executable)
    (tmp_path / "run").write_text("import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))")
    (tmp_path / "driver.py").write_text(DRIVER)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run(
        [tmp_path / "uv", "run", sys.executable, "driver.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{ROOT}:{packages}"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "answer 42" in done.stdout, done.stdout + done.stderr


def test_a_killed_command_leaves_no_process_of_its_cluster_that_computes(tmp_path):
    code = DRIVER + "    print('up', flush=True)\n    import time; time.sleep(100)\n"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while process.stdout.readline() != "up\n":
        assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    agents = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # they look for their cluster for a minute
    names = {one: one.name() for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE}
    _, alive = psutil.wait_procs([one for one, name in names.items() if name not in agents], timeout=30)
    assert alive == []
