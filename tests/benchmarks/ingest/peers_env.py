"""An environment of their own for the peers: nothing of theirs comes into the product's."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

PEERS = {"mds": "mosaicml-streaming==0.13.0", "litdata": "litdata==0.2.76", "webdataset": "webdataset==1.0.2"}
SHARED = ("simplejpeg", "pyarrow")
"""In the peers' environment in the very versions that the product has."""


def install_peers(folder: Path, wanted: list[str]) -> dict[str, str]:
    """Make `folder` an environment that has the wanted peers. -> for each that it has not: why."""
    python = folder / "bin" / "python"
    torch = f"torch=={version('torch').split('+')[0]}"
    if not (folder / "torch.ready").exists():
        run([sys.executable, "-m", "venv", str(folder)])
        # Alone and first: where a CPU build is offered, a later range must not replace it by gigabytes of CUDA.
        if error := pip(python, [torch]):
            return dict.fromkeys(wanted, f"not installed: {error}")
        (folder / "torch.ready").touch()
    common = [torch, *[f"{name}=={version(name)}" for name in SHARED]]
    failed: dict[str, str] = {}
    for name in wanted:
        ready = folder / f"{name}.ready"
        if ready.exists() and ready.read_text() == " ".join([*common, PEERS[name]]):
            continue
        error = pip(python, [*common, PEERS[name]]) or drop_unusable_torchvision(python)
        if error:
            failed[name] = f"not installed: {error}"
        else:
            ready.write_text(" ".join([*common, PEERS[name]]))
    return failed


def pip(python: Path, packages: list[str]) -> str:
    """'' or the reason why it failed"""
    print(f"installing {' '.join(packages)} for the peers", file=sys.stderr, flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
    return (lines[-1] if lines else f"pip exited with {done.returncode}") if done.returncode else ""


def drop_unusable_torchvision(python: Path) -> str:
    """PyPI's torchvision is built for a CUDA torch; beside a CPU one it breaks whoever looks whether it is there."""
    broken = subprocess.run([str(python), "-c", "import torchvision"], capture_output=True).returncode
    if broken:
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
    return ""


def stand_in_for_torchvision() -> None:
    """`streaming` imports torchvision for datasets that nobody uses here, and torchvision has no build for a CPU-only
    torch on PyPI: where it is missing, empty classes take the place of the three names."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        importlib.import_module("transformers.feature_extraction_utils")  # first: it looks whether torchvision is there
        classes = {"datasets": ["VisionDataset", "CIFAR10"], "transforms": [], "transforms.functional": ["to_tensor"]}
        sys.modules["torchvision"] = types.ModuleType("torchvision")
        for name, members in classes.items():
            module = sys.modules[f"torchvision.{name}"] = types.ModuleType(f"torchvision.{name}")
            for member in members:
                setattr(module, member, type(member, (), {}))


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
