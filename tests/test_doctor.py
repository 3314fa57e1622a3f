"""`ray_jobs.doctor`: the truth about this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from doctor_cases import (
    ROOT,
    command,
    copied_dataset,
    dataset,
    nothing_set,
    options,
    worst,
)

import fvlm
from fvlm import presets
from fvlm.checks import disk
from fvlm.checks.run import checkpoints_left, parameters
from fvlm.checks.software import look_at_software, pins, wanted
from fvlm.model.hub import build_model
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.state import checkpoint_name, contents_of
from fvlm.train.store import LocalStore, prune
from ray_jobs import doctor

quick = pytest.fixture(autouse=True)(nothing_set)
good = pytest.fixture(scope="module")(dataset)
data = pytest.fixture(copied_dataset)


def test_the_command_tells_the_truth_and_no_secret(data, tmp_path):
    secrets = {
        "WANDB_API_KEY": "a" * 33 + "planted1",
        "AWS_SECRET_ACCESS_KEY": "planted2",
        "RAY_AUTH_TOKEN": "planted3",
    }
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password planted4\n")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "token").write_text("planted5")
    env = os.environ | secrets | {"RAY_AUTH_MODE": "token", "NETRC": str(tmp_path / "netrc")}
    done = command(*options(data, tmp_path / "runs", "--log.wandb", "offline"), env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    said = done.stdout
    assert "planted" not in said
    assert f"{os.cpu_count()} CPUs" in said and platform.release() in said
    assert f"ok    Python: {platform.python_version()}\n" in said
    pip = subprocess.run([sys.executable, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True)
    versions = {each["name"]: each["version"] for each in json.loads(pip.stdout)}
    for name in ("torch", "ray", "transformers"):
        assert f"  {name}: {versions[name]}\n" in said
    assert f"memory: {psutil.virtual_memory().total / 1e9:.1f} GB" in said
    free = shutil.disk_usage(tmp_path).free / 1e9
    shown = float(re.search(r"runs disk: .* ([\d.,]+) GB free", said)[1].replace(",", ""))
    assert shown == pytest.approx(free, abs=0.2 + 0.02 * free)
    stored = sum(path.stat().st_size for path in data.glob("*.parquet") if path.name.startswith("shard"))
    assert f"24 clips of 8 frames, 56 px, in 3 shards, {stored / 1e6:.1f} MB" in said
    assert "token has mode" in said and f"chmod 600 {tmp_path}/cluster/token" in said
    assert not list((tmp_path / "runs").glob("*")) and not (tmp_path / "runs").exists()


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(...)` -> exit code and output of the command, in this process."""

    def run(*args: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["doctor", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            doctor.main()
        said = capsys.readouterr()
        return end.value.code, said.out + said.err

    return run


def test_without_a_preset_the_machine_alone_is_looked_at_and_json_is_a_line_each(call):
    code, said = call("--json")
    found = [json.loads(line) for line in said.splitlines()]
    assert code == (1 if any(each["level"] == "FAIL" for each in found) else 0)
    what = {each["what"].split(" 0")[0] for each in found}
    assert {"system", "memory", "Python", "torch", "GPU", "ports"} <= what and not {"data", "weights"} & what
    assert set(found[0]) == {"level", "what", "value", "cure"}


def test_a_typo_ends_it_with_code_2_and_a_run_that_would_fail_with_1(call, tmp_path):
    code, said = call("demo", "--data.pth", "x")
    assert code == 2 and "--data.path" in said
    code, said = call("demo", "--data.lanes", "7")
    assert code == 2 and "error: --data.lanes 7 does not divide" in said
    code, said = call(*options(tmp_path / "nothing", tmp_path / "runs"))
    assert code == 1
    assert re.search(
        r"FAIL  data: .*nothing: not a dataset .*\n      -> Make one with `python -m ray_jobs.prepare", said
    )


def test_versions_are_held_against_the_projects_files():
    python, requirements = wanted(ROOT)
    assert python == ">=3.11" and {"torch", "ray", "pyarrow"} <= {each.name for each in requirements}
    torch_pin = re.search(r"(?m)^torch==(.*)$", (ROOT / "constraints.txt").read_text())[1]
    assert pins(ROOT)["torch"] == torch_pin
    found = worst(look_at_software())
    assert [each for each in found.values() if each.level == "FAIL"] == []
    assert found["torch"].value == torch.__version__
    assert fvlm.__file__.startswith(str(ROOT))


def test_a_disks_speed_is_that_of_the_disk_and_not_of_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(48 << 20))
    os.sync()
    path.read_bytes()  # now in the page cache
    name = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(name)}:{os.minor(name)}/stat")
    if not stat.exists():
        pytest.skip("this file system has no block device whose reads could be counted")
    before = int(stat.read_text().split()[2])
    speed = disk.read_speed([path])
    sectors = int(stat.read_text().split()[2]) - before
    assert sectors * 512 >= speed.bytes == 16 << 20
    free = shutil.disk_usage(tmp_path).free
    written = disk.write_speed(tmp_path)
    assert written.bytes == 16 << 20 and [p.name for p in tmp_path.iterdir()] == ["file"]
    assert shutil.disk_usage(tmp_path).free == pytest.approx(free, abs=200e6)


def test_parameters_and_checkpoints_are_counted_as_they_will_be(tmp_path):
    config = presets.get("demo")
    model = build_model(config.model, (4, 14, 14), 0)
    assert parameters(config.model, (4, 14, 14)) == sum(p.numel() for p in model.parameters())
    freeze_unreached(model, config)
    optimizer = make_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    LocalStore(tmp_path).write(contents_of(1, model, optimizer, {}))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 12 * parameters(config.model, (4, 14, 14)) == pytest.approx(size, rel=0.03)


class Names:
    """A store in which checkpoints are names."""

    def __init__(self) -> None:
        self.there: list[str] = []

    def names(self) -> list[str]:
        return self.there

    def delete(self, name: str) -> None:
        self.there.remove(name)


@pytest.mark.parametrize("changes", [{}, {"milestones": ()}, {"keep_last": 1, "save_every": 700}, {"max_steps": 900}])
@pytest.mark.parametrize("done", [0, 12_000])
def test_the_room_for_checkpoints_is_what_a_whole_run_takes(changes, done):
    config = presets.get("joint_multifine")
    train = dataclasses.replace(config.train, **changes)
    config = dataclasses.replace(config, train=train)
    store, most, before = Names(), 0, None
    for step in range(train.save_every, train.max_steps + 1, train.save_every):
        if step > done and before is None:
            before = len(store.there)
        store.there.append(checkpoint_name(step))
        most = max(most, len(store.there))
        prune(store, step, train.keep_last, train.milestones)
    more = most - before if before is not None else 0
    assert more <= checkpoints_left(config, done) <= more + train.keep_last
