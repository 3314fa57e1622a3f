"""Python, packages, the build of torch, and the GPUs that it sees."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

import fvlm
from fvlm.checks.finding import Finding, gb
from fvlm.checks.machine import Machine
from fvlm.wsl2 import NO_FALLBACK

PROJECT = Path(fvlm.__file__).resolve().parents[1]
CONSTRAINTS = "constraints.txt"
INSTALL = f"pip install -c {CONSTRAINTS} -e . (in {PROJECT})"
SHOWN = ("torch", "ray", "transformers")
"""Packages that get a line of their own; the others share one."""
LEAST_FREE = 0.9
"""Less of a GPU's memory than this is free only when something else uses it."""
BF16_SINCE = 8
"""Compute capability, its first number."""
Device = Literal["auto", "cpu", "cuda"]


def look_at_software(project: Path = PROJECT) -> list[Finding]:
    """project: the folder with pyproject.toml and constraints.txt; without them the installed package tells."""
    python, requirements = wanted(project)
    have = platform.python_version()
    fits = have in SpecifierSet(python)
    found = [
        Finding("ok" if fits else "FAIL", "Python", have if fits else f"{have}, but {python} is needed",
                "" if fits else "Make the environment with such a Python: `make .venv/ready PYTHON=python3.11`.")
    ]  # fmt: skip
    versions, right = pins(project), 0
    for requirement in requirements:
        finding = look_at_package(requirement, versions.get(requirement.name.lower(), ""))
        if finding.level == "ok" and requirement.name not in SHOWN:
            right += 1
        else:
            found.append(finding)
    return [*found, Finding("ok", "packages", f"{right} others as required")]


def look_at_package(requirement: Requirement, pin: str) -> Finding:
    """pin: the version that the tests ran with; "" where that is not known."""
    name = requirement.name
    try:
        have = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("FAIL", name, "is not installed", INSTALL)
    try:
        version = Version(have)
    except InvalidVersion:
        return Finding("FAIL", name, f"has no version that can be read ({have!r})", INSTALL)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("FAIL", name, f"{have}, but {requirement.specifier} is needed", INSTALL)
    if pin and Version(version.public) != Version(pin):
        return Finding("note", name, f"{have}; the tests ran with {pin}", INSTALL)
    return Finding("ok", name, have)


def wanted(project: Path) -> tuple[str, list[Requirement]]:
    """-> the versions of Python, and the packages, that the project asks for."""
    path = project / "pyproject.toml"
    if path.is_file():
        asked = tomllib.loads(path.read_text())["project"]
        return asked["requires-python"], [Requirement(text) for text in asked["dependencies"]]
    requirements = map(Requirement, importlib.metadata.requires("fvlm") or [])
    python = importlib.metadata.metadata("fvlm")["Requires-Python"]
    return python, [each for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]


def pins(project: Path) -> dict[str, str]:
    """Package, in lower case -> the version that the tests ran with; {} where constraints.txt is not at hand."""
    path = project / CONSTRAINTS
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().lower(): version.strip() for name, _, version in pairs}


def look_at_gpus(machine: Machine, device: Device = "auto", ranks: int = 1, bf16: bool = False) -> list[Finding]:
    """device, ranks: as the run wants them"""
    import torch  # not above: that it cannot be imported is to be said in words

    nodes = machine.nvidia_gpus()
    if device == "cpu":
        return [Finding("ok", "GPU", "not wanted: --scale.device cpu")]
    if torch.version.cuda is None:
        return [_no_cuda_build(torch.__version__, nodes, device)]
    if not torch.cuda.is_available():
        return [_no_driver(nodes, device)]
    return _cuda_gpus(ranks, bf16) + ([_sysmem_fallback()] if machine.is_wsl2 else [])


def _sysmem_fallback() -> Finding:
    return Finding(
        "note",
        "GPU memory",
        "WSL2: when it is full, Windows' driver goes on in system memory, many times slower, instead of failing",
        f"{NO_FALLBACK}. A run leaves some memory free, and says in its log when steps look like it.",
    )


def _no_cuda_build(version: str, nodes: list[str], device: Device) -> Finding:
    build = f"torch {version} is built without CUDA"
    if nodes:
        pin = Version(version).public
        return Finding(
            "FAIL",
            "GPU",
            f"{build}, and this machine has an NVIDIA GPU ({', '.join(nodes)}): a run would compute on the CPU",
            f"pip install --force-reinstall -c {CONSTRAINTS} torch=={pin} (from PyPI, which has the CUDA build); "
            "--scale.device cpu if that is meant.",
        )
    if device == "cuda":
        return Finding(
            "FAIL", "GPU", f"none; {build}, and --scale.device is cuda", "--scale.device cpu, or another machine."
        )
    return Finding("note", "GPU", f"none; {build}: a run on this machine computes on the CPU")


def _no_driver(nodes: list[str], device: Device) -> Finding:
    import torch

    build = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    if not nodes:
        level: Literal["FAIL", "note"] = "FAIL" if device == "cuda" else "note"
        return Finding(level, "GPU", f"none that {build} sees: a run on this machine computes on the CPU")
    try:
        torch.cuda.init()
        reason = "no device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    return Finding(
        "FAIL",
        "GPU",
        f"{build} cannot use {', '.join(nodes)} ({reason})",
        f"Bring the NVIDIA driver up to one that supports CUDA {torch.version.cuda}; `nvidia-smi` shows which it "
        "supports. In a container: start it with --gpus all. On WSL2 the driver is that of Windows.",
    )


def _cuda_gpus(ranks: int, bf16: bool) -> list[Finding]:
    import torch

    found = []
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {gb(free)} of {gb(total)} free, CUDA {torch.version.cuda}"
        if free < LEAST_FREE * total:
            cure = "`nvidia-smi` names the processes that hold the rest; on WSL2 the Windows desktop is one."
            found.append(Finding("warn", f"GPU {index}", text, cure))
        elif bf16 and about.major < BF16_SINCE:
            cure = f"It computes bf16 slowly (compute capability {about.major}.{about.minor}): --train.precision fp32."
            found.append(Finding("warn", f"GPU {index}", text, cure))
        else:
            found.append(Finding("ok", f"GPU {index}", text))
    if ranks > count:
        found.append(
            Finding(
                "FAIL",
                "GPUs",
                f"{count} here for {ranks} ranks",
                f"--scale.workers {count}, or submit to a cluster that has {ranks} (`ray_jobs.submit`).",
            )
        )
    return found
