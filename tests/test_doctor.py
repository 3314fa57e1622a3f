"""`ray_jobs.doctor`: the truth about this machine, and the right cure for set-ups that are broken on purpose."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from datasets import write_dataset

import fvlm
from fvlm import presets
from fvlm.checks import disk
from fvlm.checks.access import LocalCluster, look_at_cluster, look_at_hub, look_at_token, look_at_wandb
from fvlm.checks.finding import Finding
from fvlm.checks.machine import Machine, look_at_machine
from fvlm.checks.run import checkpoints_left, parameters
from fvlm.checks.software import look_at_gpus, look_at_package, look_at_software, pins, wanted
from fvlm.data.shards import read_manifest
from fvlm.model.hub import build_model
from fvlm.train.memory import Need
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.run_folder import exclusive, open_run
from fvlm.train.state import MODEL, checkpoint_name, contents_of, step_of
from fvlm.train.store import LocalStore, prune
from ray_jobs import doctor
from ray_jobs.checkup import look, look_at_step_memory, look_at_store
from ray_jobs.options import parse

ROOT = Path(__file__).resolve().parents[1]
WSL2_VERSION = (
    "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@f9c826d3017f) (gcc (GCC) 11.2.0, GNU ld (GNU Binutils) "
    "2.37) #1 SMP Tue Nov 5 00:21:55 UTC 2024\n"
)
WSL2_MOUNTS = r"""none /mnt/wsl tmpfs rw,relatime 0 0
none /usr/lib/wsl/drivers 9p ro,nosuid,nodev,noatime,aname=drivers;fmask=222;dmask=222,mmap,access=client,trans=fd 0 0
/dev/sdc / ext4 rw,relatime,discard,errors=remount-ro,data=ordered 0 0
proc /proc proc rw,nosuid,nodev,noexec,noatime 0 0
C:\134 /mnt/c 9p rw,noatime,dirsync,aname=drvfs;path=C:\134;uid=1000;gid=1000;symlinkroot=/mnt/,mmap,trans=fd 0 0
D:\134 /mnt/My\040Disk 9p rw,noatime,dirsync,aname=drvfs;path=D:\134;uid=1000;gid=1000;symlinkroot=/mnt/,trans=fd 0 0
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short disk tests, and a shell of a user who has set nothing."""
    monkeypatch.setattr(disk, "MOST_BYTES", 16 << 20)
    for name in list(os.environ):
        if name.startswith(("RAY_", "FVLM_", "WANDB_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("FVLM_CLUSTER_DIR", str(tmp_path / "cluster"))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A dataset that is never changed."""
    return Path(write_dataset(tmp_path_factory.mktemp("doctor") / "data", clips=24).where)


@pytest.fixture
def data(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "data"))


def options(data: Path | str, runs: Path, *more: str) -> list[str]:
    small = "--data.frame-size 56 --data.global-batch 4 --data.lanes 4 --log.wandb off --scale.device cpu"
    return ["demo", "--data.path", str(data), "--runs-dir", str(runs), *small.split(), *more]


def copied_root(folder: Path, **files: str) -> Machine:
    """Real copies of the kernel's files, but for `files`: name with __ for / -> text."""
    for name in ("proc/version", "proc/mounts", "proc/meminfo", "proc/self/cgroup"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(Path("/", name).read_text())
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "dev").mkdir(exist_ok=True)
    (folder / "dev" / "shm").symlink_to("/dev/shm")
    return Machine(folder)


def look_at(args: list[str], machine: Machine | None = None) -> dict[str, Finding]:
    """What is said of a run; of several findings about one thing, the worst."""
    return worst(look(parse(args), 0.12, machine or Machine(), os.environ))


def worst(findings) -> dict[str, Finding]:
    order = ("ok", "note", "warn", "FAIL")
    found: dict[str, Finding] = {}
    for each in findings:
        if each.what not in found or order.index(each.level) > order.index(found[each.what].level):
            found[each.what] = each
    return found


def require(finding: Finding, level: str, value: str, cure: str) -> None:
    assert finding.level == level and value in finding.value and cure in finding.cure, str(finding)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own; where that is not permitted the test is skipped with its reason."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "fvlm-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ---- the truth about this machine


def command(*args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ray_jobs.doctor", *map(str, args)]
    return subprocess.run(line, cwd=ROOT, env=env or os.environ, capture_output=True, text=True, timeout=250)


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


# ---- set-ups that are broken: the right cure for each


def test_a_truncated_a_missing_and_a_foreign_shard(data, tmp_path):
    shard = data / "shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    require(
        look_at(options(data, tmp_path / "runs"))["data"], "FAIL", f"{shard}: {len(whole) - 100} bytes", "Restore it"
    )
    replaced = look_at(options(data, tmp_path / "runs", "--data.on-corrupt", "replace"))["data"]
    require(replaced, "warn", f"{shard}: {len(whole) - 100} bytes", "")
    shard.unlink()
    require(look_at(options(data, tmp_path / "runs"))["data"], "FAIL", f"{shard}: the manifest lists", "Restore it")


def test_a_manifest_that_is_missing_or_damaged(data, tmp_path):
    (data / "files.parquet").write_bytes(b"nothing")
    require(look_at(options(data, tmp_path / "runs"))["data"], "FAIL", "its SHA-256 is not", "Restore both")
    (data / "manifest.json").unlink()
    require(look_at(options(data, tmp_path / "runs"))["data"], "FAIL", "not a dataset", "ray_jobs.prepare")


def test_frames_of_another_size(good, tmp_path):
    found = look_at(options(good, tmp_path / "runs", "--data.frame-size", "256"))
    require(found["data"], "FAIL", "frames of 56 px; the config wants 256", "--data.frame-size 56")
    assert found["runs disk"].level == "ok"  # what does not hang on it is looked at all the same


def test_too_little_memory_for_the_ingest(good, tmp_path):
    found = look_at(options(good, tmp_path / "runs", "--ingest-memory", "10MB"))
    require(found["data"], "FAIL", "--ingest-memory: 10 MB for 1 rank is too little", "Least:")


def test_a_disk_that_is_nearly_full_or_has_no_room_for_one_checkpoint(good, tmp_path):
    with mounted(tmp_path / "small", "size=100m") as small:  # a checkpoint of demo has 30 MB
        require(look_at(options(good, small))["runs disk"], "warn", "wanted", "--runs-dir another disk")
        with (small / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 80 << 20)
        require(look_at(options(good, small))["runs disk"], "FAIL", "free, ", f"Free some room on {small}")
        few = ["--train.save-every", "160", "--train.keep-last", "1"]
        (small / "filler").unlink()
        require(look_at(options(good, small, *few))["runs file system"], "warn", "a reboot loses it", "on a disk")


def test_a_folder_of_runs_that_is_read_only(good, tmp_path):
    with mounted(tmp_path / "fixed", "size=10m,ro") as fixed:
        require(look_at(options(good, fixed))["runs disk"], "FAIL", "Read-only file system", "--runs-dir takes another")


def test_shared_memory_that_is_too_small_for_the_ingest(good, tmp_path):
    machine = copied_root(tmp_path / "root")
    (tmp_path / "root" / "dev" / "shm").unlink()
    with mounted(tmp_path / "root" / "dev" / "shm", "size=64m"):  # Docker's default
        require(look_at(options(good, tmp_path), machine)["object store"], "warn", "/dev/shm has 67.1 MB", "--shm-size")
        found = worst(look_at_store(machine, {}, 11 * 10**9))
        require(found["object store"], "FAIL", "Ray refuses to start", "remount,size=22G")


def test_a_cluster_whose_object_store_is_too_small():
    (found,) = (
        each for each in look_at_store(Machine(), {"FVLM_OBJECT_STORE_MB": "100"}, 300 * 10**6) if "'s" in each.what
    )
    require(found, "warn", "would have 104.9 MB", "FVLM_OBJECT_STORE_MB=287")


def test_a_port_that_another_process_holds(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"FVLM_DASHBOARD_PORT": str(port), "FVLM_CLUSTER_DIR": str(tmp_path)}
        found = worst(look_at_cluster(env))["ports"]
        require(found, "warn", f"{port} (", "FVLM_DASHBOARD_PORT")
        assert f"process {os.getpid()}" in found.value


def test_the_ports_and_the_store_of_our_own_cluster_are_known_as_its_own(tmp_path):
    """A process that is to start.sh's head what matters here: its command line, its session, its ports."""
    listen = "import socket,sys,time; s=socket.socket(); s.bind(('127.0.0.1',0)); s.listen(); "
    listen += "print(s.getsockname()[1], flush=True); time.sleep(60)"
    line = [sys.executable, "-c", listen, f"--temp-dir={tmp_path}/ray", "--object-store-memory=12345678"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        port = process.stdout.readline().strip()
        env = {"FVLM_DASHBOARD_PORT": port, "FVLM_CLUSTER_DIR": str(tmp_path)}
        (tmp_path / "pid").write_text(f"{process.pid}\n")
        cluster = LocalCluster.of(env)
        assert (cluster.process, cluster.store_bytes) == (process.pid, 12345678)
        found = worst(look_at_cluster(env))
        require(found["ports"], "ok", f"our own cluster of {tmp_path} (process {process.pid})", "")
        require(
            found["token"], "warn", "asks for its token", f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={tmp_path}"
        )
        require(
            worst(look_at_store(Machine(), env, 10**8))["cluster's store"], "FAIL", "12.3 MB", "FVLM_OBJECT_STORE_MB=96"
        )
    finally:
        process.kill()
        process.wait()
    assert LocalCluster.of(env).process is None  # its head died
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    assert LocalCluster.of(env).process is None  # the number has become another process's


def test_a_token_that_others_may_read_is_missing_or_empty(tmp_path):
    token = tmp_path / "token"
    token.write_text("planted")
    token.chmod(0o644)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "FVLM_CLUSTER_DIR": str(tmp_path / "other")}
    found = worst(look_at_token(LocalCluster.of(env), env))
    require(found["token secret"], "warn", "mode 644", f"chmod 600 {token}")
    token.chmod(0o600)
    assert [each.level for each in look_at_token(LocalCluster.of(env), env)] == ["ok"]
    token.write_text("")
    require(
        worst(look_at_token(LocalCluster.of(env), env))["token"], "FAIL", "not there or empty", "RAY_AUTH_TOKEN_PATH="
    )
    env.pop("RAY_AUTH_TOKEN_PATH")
    require(
        worst(look_at_token(LocalCluster.of(env), env))["token"], "FAIL", "no token is given", "RAY_AUTH_TOKEN_PATH="
    )


@pytest.mark.parametrize("address, cure", [("127.0.0.1:9", "Start it"), ("http://127.0.0.1:8265", "unset RAY_ADDRESS")])
def test_an_address_of_a_cluster_that_is_none(address, cure):
    require(worst(look_at_cluster({"RAY_ADDRESS": address}))["RAY_ADDRESS"], "FAIL", address, cure)


class Hub(http.server.BaseHTTPRequestHandler):
    """Has one model."""

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path.startswith("/facebook/dinov2-small/") else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


def test_weights_that_are_nowhere_on_the_hub_or_in_the_cache(tmp_path, monkeypatch):
    config = presets.get("joint_multifine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    vision, language = look_at_hub(config, begun=False)
    require(vision, "FAIL", "127.0.0.1:9 cannot be reached", "hf download facebook/dinov2-small")
    assert look_at_hub(config, begun=True)[0].level == "ok"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        vision, language = look_at_hub(config, begun=False)
        require(vision, "note", "the first start fetches them", "")
        require(language, "FAIL", "HTTP 404", "--model.language with a folder")
        hub.shutdown()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    require(look_at_hub(config, begun=False)[0], "FAIL", "HF_HUB_OFFLINE", "hf download")

    here = tmp_path / "models--facebook--dinov2-small"  # the cache's own layout
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text("abc")
    (here / "snapshots" / "abc").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (here / "snapshots" / "abc" / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    require(look_at_hub(config, begun=False)[0], "ok", f"in {tmp_path}", "")
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=str(here / "snapshots")))
    require(
        look_at_hub(half, begun=False)[0], "FAIL", "the folder has no model.safetensors, config.json", "--model.vision"
    )


def test_wandb_online_without_a_key_and_a_key_that_others_may_read(tmp_path, monkeypatch):
    config = parse(["demo", "--log.wandb", "online"])
    require(look_at_wandb(config)[0], "FAIL", "there is no key", "wandb login")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password planted\n")
    (tmp_path / "netrc").chmod(0o644)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    found = worst(look_at_wandb(config))
    require(found["W&B secret"], "warn", "mode 644", "chmod 600")
    require(found["W&B"], "warn", "127.0.0.1:9 cannot be reached", "--log.wandb offline")
    assert "planted" not in str(found)


def test_where_all_is_well_no_finding_holds_a_secret_either(tmp_path, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://name:planted-password@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("WANDB_API_KEY", "planted-key")
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("HF_TOKEN", "planted-token")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        (tmp_path / "token").write_text("planted-secret")
        (tmp_path / "token").chmod(0o600)
        env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
        wandb = look_at_wandb(parse(["demo", "--log.wandb", "online"]))
        weights = look_at_hub(presets.get("joint_multifine"), begun=False)
        token = look_at_token(LocalCluster.of(os.environ), env)
        token += look_at_token(LocalCluster.of(os.environ), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "planted-2"})
        server.shutdown()
    assert [each.level for each in (*wandb, *weights, *token)] == ["ok", "note", "FAIL", "ok", "ok"]
    assert "planted" not in "".join(map(str, (*wandb, *weights, *token)))


def test_a_build_of_torch_without_cuda_beside_an_nvidia_gpu(good, tmp_path):
    if torch.version.cuda:
        pytest.skip("torch has CUDA here")
    machine = copied_root(tmp_path / "root")
    node = tmp_path / "root" / "dev" / "nvidia0"
    try:
        os.mknod(node, 0o600 | 0o020000, os.makedev(195, 0))  # a character device, as the driver makes it
    except PermissionError:
        node.touch()
    found = look_at(options(good, tmp_path / "runs", "--scale.device", "auto"), machine)
    require(found["GPU"], "FAIL", "(/dev/nvidia0)", "pip install --force-reinstall -c constraints.txt torch==2.13.0")
    assert look_at_gpus(machine, "cpu")[0].level == "ok"
    node.unlink()
    assert look_at_gpus(machine)[0].level == "note"
    require(look_at_gpus(machine, "cuda")[0], "FAIL", "--scale.device is cuda", "--scale.device cpu")
    for name in ("dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"):  # WSL2 has no device node of NVIDIA's
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    require(look_at_gpus(machine)[0], "FAIL", "(/dev/dxg)", "torch==")


@pytest.fixture
def cuda(monkeypatch):
    """`cuda(free, major)`: torch sees one GPU of 24 GB."""

    def see(free: float, major: int = 8) -> None:
        about = type("About", (), {"name": "RTX", "major": major, "minor": 0})
        monkeypatch.setattr(torch.version, "cuda", "12.9")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(free), 24 * 10**9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)

    return see


def test_what_a_step_takes_is_compared_with_what_is_free_on_the_gpu(cuda, monkeypatch):
    config = presets.demo()
    need = Need(weights=1, optimizer=2, gradients=1, peak=12 * 10**9)
    monkeypatch.setattr("ray_jobs.checkup.estimate", lambda settled, latent, clips: need if clips == 8 else None)
    monkeypatch.setattr("fvlm.train.memory.estimate", lambda settled, latent, clips: need)
    cuda(23e9)
    assert str(look_at_step_memory(config, (4, 14, 14))[0]) == (
        "ok    memory of a step: about 12.0 GB (weights 0.0, gradients 0.0, optimizer 0.0, activations and workspace "
        "12.0) with train.memory speed; GPU 0 has 23.0 GB free"
    )
    cuda(12e9)
    require(look_at_step_memory(config, (4, 14, 14))[0], "FAIL", "train.memory small", "--data.global-batch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not look_at_step_memory(config, (4, 14, 14))


def test_gpus_that_are_held_too_few_too_old_or_without_a_driver(cuda, tmp_path, monkeypatch):
    cuda(23e9)
    assert [str(each) for each in look_at_gpus(Machine())] == ["ok    GPU 0: RTX, 23.0 GB of 24.0 GB free, CUDA 12.9"]
    require(look_at_gpus(Machine(), "cuda", 4)[1], "FAIL", "1 here for 4 ranks", "--scale.workers 1")
    cuda(10e9)
    require(look_at_gpus(Machine())[0], "warn", "10.0 GB of 24.0 GB free", "nvidia-smi")
    cuda(23e9, major=7)
    require(look_at_gpus(Machine(), bf16=True)[0], "warn", "RTX", "--train.precision fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = copied_root(tmp_path, dev__nvidia0="")
    require(look_at_gpus(machine)[0], "FAIL", "cannot use /dev/nvidia0", "NVIDIA driver")


def test_data_and_runs_on_a_drive_of_windows(good, data, tmp_path):
    drive = f"D:\\134 {tmp_path} 9p rw,noatime,dirsync,aname=drvfs;path=D:\\134;uid=1000;gid=1000,mmap,trans=fd 0 0\n"
    machine = copied_root(tmp_path / "root", proc__version=WSL2_VERSION, proc__mounts=WSL2_MOUNTS + drive)
    found = look_at(options(data, tmp_path / "runs"), machine)
    require(found["system"], "note", "5.15.167.4-microsoft-standard-WSL2", ".wslconfig")
    wanted = f"{data} lies on {tmp_path}, a drive of Windows (9p)"
    require(found["data file system"], "warn", wanted, f"cp -a {data} ~/data and --data.path ~/data")
    require(found["runs file system"], "warn", "a drive of Windows (9p)", "--runs-dir ~/")
    assert "data file system" not in look_at(options(good, tmp_path / "runs"), copied_root(tmp_path / "plain"))


def test_mounts_are_read_as_the_kernel_writes_them(tmp_path):
    machine = copied_root(tmp_path, proc__version=WSL2_VERSION, proc__mounts=WSL2_MOUNTS)
    kinds = {"/mnt/c/x": "9p", "/mnt/cc": "ext4", "/mnt/My Disk/clips": "9p", "/home/u": "ext4", "/mnt/wsl/x": "tmpfs"}
    assert {path: machine.mount_of(Path(path)).kind for path in kinds} == kinds
    here = Machine().mount_of(Path("/proc/self"))
    assert (here.kind, here.point) == ("proc", "/proc")
    target = subprocess.run(["findmnt", "-no", "TARGET,FSTYPE", "-T", ROOT], capture_output=True, text=True)
    if target.returncode == 0:
        mount = Machine().mount_of(ROOT)
        assert [mount.point, mount.kind] == target.stdout.split()


def test_memory_is_that_of_the_container_where_that_is_less(good, tmp_path):
    assert Machine().memory().total == psutil.virtual_memory().total
    small = {"sys__fs__cgroup__job__memory.max": "max\n", "sys__fs__cgroup__memory.max": f"{1 << 30}\n"}
    machine = copied_root(tmp_path / "two", proc__self__cgroup="0::/job/inner\n", **small)
    assert machine.memory().limit == machine.memory().usable == 1 << 30
    found = look_at(options(good, tmp_path / "runs"), machine)
    require(found["memory of the run"], "FAIL", "there are 1.1 GB", "--ingest-memory")
    old = {"sys__fs__cgroup__memory__memory.limit_in_bytes": f"{1 << 29}\n"}
    machine = copied_root(tmp_path / "one", proc__self__cgroup="4:memory:/\n1:name=systemd:/\n", **old)
    assert machine.memory().usable == 1 << 29


def test_limits_that_ray_and_torch_would_run_into(tmp_path):
    machine = copied_root(tmp_path, proc__sys__vm__overcommit_memory="2\n")
    require(worst(look_at_machine(machine))["memory policy"], "warn", "vm.overcommit_memory is 2", "sysctl")
    said = subprocess.run(
        [sys.executable, "-c", "from fvlm.checks.machine import *\nfor f in look_at_machine(Machine()): print(f)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)),
    ).stdout
    assert "warn  open files: a process may have 1024" in said and "LimitNOFILE" in said


def test_a_run_that_another_process_trains(good, tmp_path):
    args = options(good, tmp_path / "runs")
    run_dir = open_run(parse(args), read_manifest(good))
    assert look_at(args)["run demo"].level == "ok"
    with exclusive(run_dir):
        require(look_at(args)["run demo"], "FAIL", "trained by another process", "another --run")
    changed = look_at([*args, "--optim.lr", "0.5"])["run demo"]
    require(changed, "FAIL", "this run began with another config", "")
    assert "optim.lr: 0.001 -> 0.5" in f"{changed.value} {changed.cure}"


def test_a_checkpoint_that_is_damaged_and_a_run_that_is_finished(good, tmp_path):
    args = options(good, tmp_path / "runs")
    run_dir = open_run(parse(args), read_manifest(good))
    model, store = torch.nn.Linear(3, 3), LocalStore(run_dir / "checkpoints")
    for step in (50, 160):
        store.write(contents_of(step, model, torch.optim.AdamW(model.parameters()), {}))
    require(look_at(args)["run demo"], "note", "finished, 160 of 160 steps", "--train.max-steps")
    assert step_of(store.names()[-1]) == 160
    (run_dir / "checkpoints" / "step-00000160" / MODEL).unlink()
    require(look_at(args)["run demo"], "warn", "the newest checkpoint is damaged", "passes it over")


def test_a_package_of_another_version_and_one_that_is_missing_or_broken(tmp_path):
    fake = tmp_path / "ray-2.40.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.40.0\n")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('libray is broken')\n")
    done = command(env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "FAIL  ray: 2.40.0, but <2.61,>=2.60 is needed\n      -> pip install -c constraints.txt -e ." in done.stdout
    assert "FAIL  imports: libray is broken" in done.stdout
    (ray,) = [each for each in wanted(ROOT)[1] if each.name == "ray"]
    ray.name = "no-such-package"
    require(look_at_package(ray, ""), "FAIL", "is not installed", "pip install")
    ray.name, ray.specifier = "numpy", type(ray.specifier)(">=1")
    require(look_at_package(ray, "1.0"), "note", "the tests ran with 1.0", "pip install")
