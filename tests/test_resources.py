"""What a container, a unit or a shell may limit: memory, CPUs, processes, a compiler; and reasons on one line."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest
import torch
from doctor_cases import copied_root
from ray.exceptions import RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from fvlm.checks.machine import look_at_processes, require_processes
from fvlm.checks.run import look_at_compiler
from fvlm.config import TrainConfig
from fvlm.data.memory import share_out
from fvlm.errors import UserError
from fvlm.resources import available_memory, missing_for_compiling, processes_left, total_memory, usable_cpus
from fvlm.train.step import require_compiler
from ray_jobs.failure_reason import first_sentence, reason
from ray_jobs.options import parse
from ray_jobs.supervise import summary

GB = 10**9
LIMIT = 27 * GB // 10


@pytest.mark.parametrize(
    "files",
    [
        {"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory.max": str(LIMIT)},
        {"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__memory.max": str(LIMIT),
         "sys__fs__cgroup__a__b__memory.max": "max\n"},
        {"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__memory.max": str(9 * LIMIT),
         "sys__fs__cgroup__a__b__memory.high": str(LIMIT)},
        {"proc__self__cgroup": "0::/not/mounted/here\n", "sys__fs__cgroup__memory.max": f"{LIMIT}\n"},
        {"proc__self__cgroup": "12:memory:/docker/abc\n0::/\n",
         "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{LIMIT}\n"},
        {"proc__self__cgroup": "3:cpu,memory:/x/y\n", "sys__fs__cgroup__memory__x__memory.limit_in_bytes": str(LIMIT),
         "sys__fs__cgroup__memory__memory.limit_in_bytes": str(2**63 - 4096)},
    ],
    ids=["v2", "v2 above", "v2 high", "v2 host's path", "v1 docker", "v1 nested"],
)  # fmt: skip
def test_memory_is_that_of_the_container(tmp_path, files):
    machine = copied_root(tmp_path, **files)
    assert total_memory(tmp_path) == LIMIT == machine.memory().usable
    assert available_memory(tmp_path) <= LIMIT


def test_memory_without_a_limit_is_the_machines(tmp_path):
    copied_root(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__memory_max="max\n")
    assert total_memory(tmp_path) == psutil.virtual_memory().total


def test_what_the_container_uses_is_not_free_but_for_cached_files(tmp_path):
    copied_root(
        tmp_path,
        proc__self__cgroup="0::/\n",
        **{"sys__fs__cgroup__memory.max": "900000000", "sys__fs__cgroup__memory.current": "800000000",
           "sys__fs__cgroup__memory.stat": "anon 100\ninactive_file 300000000\n"},
    )  # fmt: skip
    assert available_memory(tmp_path) == 400_000_000


def test_auto_takes_a_quarter_of_the_container(monkeypatch):
    """2.7 GB: 0.68 GB for the ingest, not 1.3 or more."""
    from ray_jobs import ingest

    taken = []
    monkeypatch.setattr(ingest, "total_memory", lambda: LIMIT)
    monkeypatch.setattr(ingest, "share_out", lambda *args: taken.append(args))
    monkeypatch.setattr(ingest.Plan, "of_config", lambda *args: None)
    monkeypatch.setattr(ingest.ClipReader, "of_config", lambda *args: None)
    ingest.ingest_memory(parse(["demo"]), None)
    assert taken == [(None, 1, None, LIMIT)]
    assert share_out.__defaults__ is None


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "100000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "150000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "50000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/a\n", "sys__fs__cgroup__a__cpu.max": "max 100000\n",
          "sys__fs__cgroup__cpu.max": "100000 100000\n"}, 1),
        ({"proc__self__cgroup": "4:cpu,cpuacct:/d\n", "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us": "100000\n",
          "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n"}, 1),
        ({"proc__self__cgroup": "4:cpu:/\n", "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
          "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n"}, None),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "max 100000\n"}, None),
    ],
)  # fmt: skip
def test_cpus_are_those_of_the_quota(tmp_path, files, cpus):
    copied_root(tmp_path, **files)
    assert usable_cpus(tmp_path) == (cpus or len(os.sched_getaffinity(0)))


def test_cpus_are_those_of_the_affinity(tmp_path):
    copied_root(tmp_path, proc__self__cgroup="0::/\n")
    code = "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from pathlib import Path\n"
    code += "from fvlm.resources import usable_cpus; print(usable_cpus(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "1", done.stderr


def test_few_processes_are_said_before_a_start_hangs(tmp_path):
    few = copied_root(tmp_path, proc__self__cgroup="0::/\n",
                      **{"sys__fs__cgroup__pids.max": "300\n", "sys__fs__cgroup__pids.current": "90\n"})  # fmt: skip
    assert processes_left(tmp_path) == 210
    assert look_at_processes(few)[0].level == "FAIL"
    with pytest.raises(UserError, match=r"210 more processes and threads may be started here.*--pids-limit"):
        require_processes(few)
    (tmp_path / "sys/fs/cgroup/pids.max").write_text("1090\n")
    assert look_at_processes(few)[0].level == "warn"
    require_processes(few)
    (tmp_path / "sys/fs/cgroup/pids.max").write_text("max\n")
    assert look_at_processes(few) == [] or os.getuid()


def test_ulimit_u_counts_for_who_is_not_root(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root may become another user")
    copied_root(tmp_path, proc__self__cgroup="0::/\n")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    code = (
        "import os, sys, resource, psutil; from pathlib import Path; from fvlm.resources import processes_left\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (200, 200)); os.setuid(65533); print(processes_left(Path('/none')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and 190 <= int(done.stdout) < 200, done.stderr


# ---- a compiler


def test_a_missing_compiler_is_named_before_training_needs_it(tmp_path, monkeypatch):
    config = parse(["demo", "--train.compile", "layers", "--train.compile-cache", str(tmp_path / "cache")])
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu = pytest.raises(UserError, match=r"--train.compile layers needs a compiler \(g\+\+, or one that CXX names\)")
    with cpu:
        require_compiler(config, "cpu")
    with pytest.raises(UserError, match=r"needs a compiler \(gcc or clang, or .*CC names.*--train.compile off"):
        require_compiler(config, "cuda")
    if not torch.cuda.is_available():
        assert look_at_compiler(config)[0].level == "FAIL"
        assert look_at_compiler(parse(["demo"])) == []  # nothing is compiled on a CPU
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "compiled").touch()
    require_compiler(config, "cuda")
    (tmp_path / "gcc").touch(mode=0o755)
    assert TrainConfig().compile == "auto"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    assert missing_for_compiling("cuda") == ("" if headers.is_file() else f"Python's headers ({headers})")
    monkeypatch.setenv("CC", "/no/such/cc -O2")
    assert missing_for_compiling("cuda") == "the compiler that CC names, /no/such/cc -O2"


# ---- reasons


def test_a_reason_is_the_exceptions_own_first_sentence():
    long = "Failed to find C compiler. Please specify via CC environment variable.\n\nSet TORCHDYNAMO_VERBOSE=1\n\nbye"
    raised = RuntimeError(long)
    wrapped = UserExceptionWithTraceback(raised, f"Traceback (most recent call last):\n  x\nRuntimeError: {long}")
    assert reason(wrapped) == "RuntimeError: Failed to find C compiler."
    assert reason(RayTaskError("f", "a traceback", raised)) == "RuntimeError: Failed to find C compiler."
    assert reason(RayTaskError("f", "a", raised).as_instanceof_cause()) == "RuntimeError: Failed to find C compiler."
    failure = WorkerGroupError("many words", {1: RuntimeError("later"), 0: wrapped})
    assert summary(failure) == "rank 0 failed (RuntimeError: Failed to find C compiler.)"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 23.6 GiB.",
         "CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("backend='inductor' raised:\nRuntimeError: no compiler\n\nmore",
         "backend='inductor' raised: RuntimeError: no compiler"),
        ("", ""),
        ("\n\n  one line without an end  \n second", "one line without an end"),
        ("version 2.5 of libfoo.so.1 is too old. Update it.", "version 2.5 of libfoo.so.1 is too old."),
        ("x" * 900, "x" * 300),
    ],
)  # fmt: skip
def test_the_first_sentence(text, wanted):
    assert first_sentence(text) == wanted
