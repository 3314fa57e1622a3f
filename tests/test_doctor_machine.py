"""`ray_jobs.doctor` on ports, tokens, weights, GPUs and packages that are broken on purpose: the right cures."""

from __future__ import annotations

import dataclasses
import http.server
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from doctor_cases import (
    ROOT,
    WSL2_MOUNTS,
    WSL2_VERSION,
    command,
    copied_dataset,
    copied_root,
    dataset,
    look_at,
    nothing_set,
    options,
    require,
    worst,
)
from transformers import Dinov2Config, Dinov2Model

from fvlm import presets
from fvlm.checks.access import LocalCluster, look_at_cluster, look_at_hub, look_at_token, look_at_wandb
from fvlm.checks.machine import Machine, look_at_machine
from fvlm.checks.software import look_at_gpus, look_at_package, wanted
from fvlm.train.memory import Need
from ray_jobs.checkup import look_at_step_memory, look_at_store
from ray_jobs.options import parse

quick = pytest.fixture(autouse=True)(nothing_set)
good = pytest.fixture(scope="module")(dataset)
data = pytest.fixture(copied_dataset)


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
    (here / "refs" / "main").write_text("abcd" * 10)
    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        here / "snapshots" / ("abcd" * 10)
    )
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
