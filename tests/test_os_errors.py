"""What the disk refuses is one line with the path and a cure, exit code 2, in every command that writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import make_spec, write_dataset
from ray.exceptions import RayTaskError

from fvlm.data import parts
from fvlm.data.shards import read_manifest
from fvlm.errors import UserError
from fvlm.files import CURES, file_error
from fvlm.train import run_folder
from fvlm.train.run_folder import CONFIG, LOCK, exclusive, open_run
from ray_jobs import convert, prepare, resume, status, train
from ray_jobs.cli import run_command, told_in_one_line
from ray_jobs.options import parse

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_dataset(tmp_path_factory.mktemp("good") / "data").where)


def training(data: Path, runs: Path | str, *more: str) -> list[str]:
    small = "--data.frame-size 56 --data.global-batch 4 --data.lanes 4 --log.wandb off --scale.device cpu"
    return ["demo", "--data.path", str(data), "--runs-dir", str(runs), *small.split(), *more]


@pytest.fixture
def refusal(monkeypatch, capsys) -> Callable[..., str]:
    """`refusal(command, *args)` -> its one line; it must end with exit code 2 before Ray is started."""

    def run(main: Callable[[], None], *args: str | Path) -> str:
        def no_ray(*_: object, **__: object) -> None:
            raise AssertionError("Ray was started before the disk was looked at")

        monkeypatch.setattr(train, "connect", no_ray)
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            run_command(main)
        said = capsys.readouterr()
        assert end.value.code == 2, said.err
        assert said.err.count("\n") == 1 and said.err.startswith("error: ") and "Traceback" not in said.err
        return said.err.strip()

    return run


# ---- training


def test_a_file_where_the_folder_of_runs_should_be(refusal, good, tmp_path):
    (tmp_path / "runs").write_text("")
    said = refusal(train.main, *training(good, tmp_path / "runs"))
    assert f"{tmp_path}/runs" in said and "File exists" in said and "move it away" in said
    (tmp_path / "deep").write_text("")
    assert "A file lies where" in refusal(train.main, *training(good, tmp_path / "deep" / "a" / "b"))


def test_a_folder_where_a_file_of_the_run_should_be(refusal, good, tmp_path):
    for name in (LOCK, CONFIG, "command.json", "train.log", "corrupt.jsonl"):
        folder = tmp_path / name.replace(".", "-") / "demo" / name
        folder.mkdir(parents=True)
        said = refusal(train.main, *training(good, folder.parents[1]))
        assert str(folder.parent) in said and ("Is a directory" in said or "another --run" in said or "move" in said)


def test_a_name_that_is_too_long(refusal, good, tmp_path):
    said = refusal(train.main, *training(good, tmp_path / ("r" * 300)))
    assert "File name too long" in said and "Choose a shorter name" in said


@pytest.mark.parametrize("name", ["läufe", "试验", "a b", "..", ".", "-x", "a/b", "a?b", "a#b", "r" * 101, "a\nb", "é"])
def test_a_runs_name_that_not_every_store_and_tool_takes_is_refused_at_once(refusal, good, tmp_path, name):
    said = refusal(train.main, *training(good, tmp_path / "runs", f"--run={name}"))
    assert "a run's name is the name of a folder" in said and not (tmp_path / "runs").exists()


def test_names_that_everything_takes_are_taken(good, tmp_path):
    for name in ("a", "joint_multifine", "Run-7.b_c", "7", "r" * 100):
        assert parse(training(good, tmp_path, "--run", name)).run_name == name


@pytest.mark.parametrize("number", ["EACCES", "EPERM", "EROFS", "ESTALE", "EDQUOT", "ENOSPC", "EIO", "ENOTDIR"])
@pytest.mark.parametrize("at", ["the folder", "the lock", "the config", "the options"])
def test_whatever_the_disk_answers_at_a_start_is_one_line(refusal, good, tmp_path, monkeypatch, number, at):
    """The disk's own answers, at each of the first things that a start does in the folder of the run."""
    error = OSError(getattr(errno, number), os.strerror(getattr(errno, number)), str(tmp_path / "runs" / "demo" / "x"))

    def refuse(*_: object, **__: object) -> None:
        raise error

    if at == "the folder":
        monkeypatch.setattr(run_folder.locks, "make_dirs", refuse)
    elif at == "the lock":
        monkeypatch.setattr(run_folder.locks, "_try", refuse)
    elif at == "the config":
        monkeypatch.setattr(run_folder, "write_atomic", refuse)
    else:
        monkeypatch.setattr(train, "remember", refuse)
    said = refusal(train.main, *training(good, tmp_path / "runs"))
    assert f"{tmp_path}/runs/demo" in said and os.strerror(error.errno) in said
    assert said.rstrip(".").count(". ") >= 1  # the cure
    assert not (tmp_path / "runs" / "demo").exists()


def as_nobody(imports: str, code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python code as a user who owns nothing here; what it imports need not be readable for that one."""
    if os.getuid() != 0:
        pytest.skip("only root may become another user")
    become = f"import os, sys, encodings.idna\n{imports}\nos.setgid({NOBODY}); os.setuid({NOBODY})\n"
    command = [sys.executable, "-c", become + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.fixture
def anybody() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory(prefix="fvlm-anybody-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_another_users_folder_is_named_with_its_owner(anybody):
    (anybody / "runs" / "demo").mkdir(parents=True)
    imports = "from fvlm.train.run_folder import exclusive; from pathlib import Path; from fvlm.errors import UserError"
    code = "try:\n  exclusive(Path(sys.argv[1])).__enter__()\nexcept UserError as error: print(error)"
    done = as_nobody(imports, code, anybody / "runs" / "demo")
    assert "Permission denied" in done.stdout and "belongs to user root" in done.stdout, done.stderr
    new = as_nobody(imports, code, anybody / "runs" / "new")
    assert "Permission denied" in new.stdout and f"{anybody}/runs belongs to user root" in new.stdout, new.stderr


def test_status_shows_a_folder_that_it_may_not_read_beside_the_others(anybody, good):
    for name in ("closed", "open"):
        open_run(parse(training(good, anybody / "more", "--run", name)), read_manifest(good))
    (anybody / "more" / "closed").chmod(0o700)
    imports = "from ray_jobs.status import main; from ray_jobs.cli import run_command; import http.client"
    done = as_nobody(imports, "run_command(main)", "--runs-dir", anybody / "more")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["closed"].split()[1] == "damaged" and "Permission denied" in lines["closed:"]
    assert lines["open"].split()[1] == "failed"


# ---- the others


def test_preparing_into_what_is_no_folder(refusal, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "captions.csv").write_text("video,caption\na.mp4,a\n")
    (tmp_path / "file").write_text("")
    args = ["--videos", tmp_path / "videos", "--captions", tmp_path / "captions.csv", "--latents", "block-transform"]
    for out in (tmp_path / "file", tmp_path / "file" / "deep", tmp_path / ("o" * 300)):
        said = refusal(prepare.main, *args, "--out", out)
        assert str(out) in said and ("Not a directory" in said or "too long" in said or "exists" in said)


def test_converting_into_what_is_no_folder(refusal, tmp_path, monkeypatch):
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(tmp_path / "out" / "manifest.json"))

    monkeypatch.setattr(parts, "check_begun", stale)
    monkeypatch.setattr(convert, "_check", lambda config: None)
    monkeypatch.setattr(convert, "find_parts", lambda src: [])
    monkeypatch.setattr(convert, "_conversion", lambda config, files: SimpleNamespace(spec=make_spec()))
    said = refusal(convert.main, "--src", tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path}/out" in said and "Stale file handle" in said and "mount it anew" in said


def test_status_and_resume_of_a_file(refusal, tmp_path):
    (tmp_path / "runs").write_text("")
    assert "no such folder" in refusal(status.main, "--runs-dir", tmp_path / "runs")
    assert "no such folder" in refusal(resume.main, tmp_path / "runs")
    assert "too long" in refusal(status.main, "--runs-dir", tmp_path / ("r" * 300))


def test_resume_names_a_folder_that_fails_and_goes_on_with_the_others(tmp_path, monkeypatch, capsys):
    def examine(folder: Path) -> str:
        if folder.name == "bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / "command.json"))
        return "finished"

    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text("{}")
    monkeypatch.setattr(resume, "examine", examine)
    monkeypatch.setattr(sys, "argv", ["resume", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run_command(resume.main)
    said = capsys.readouterr().out
    assert end.value.code == 2 and "bad: error: " in said and "Input/output error" in said and "good: finished" in said


def test_every_number_has_a_cure_that_ends_in_a_full_stop():
    for number in [*CURES, 0]:
        text = str(file_error(OSError(number, "what", "/a/b"), Path("/a")))
        assert text.startswith("/a: cannot be written (what: /a/b). ") and text.endswith(".") and "{" not in text


def test_what_is_no_file_stays_a_bug_and_what_came_from_a_worker_does_not():
    assert told_in_one_line(ConnectionRefusedError(errno.ECONNREFUSED, "refused", "/x")) is None
    assert told_in_one_line(OSError("no number, no file")) is None
    assert told_in_one_line(ValueError()) is None
    lost = RayTaskError("task", "a long traceback", PermissionError(errno.EACCES, "Permission denied", "/a/b"))
    assert str(told_in_one_line(lost.as_instanceof_cause())).startswith("/a/b: cannot be used (Permission denied). ")
    caught = RuntimeError("while that")
    caught.__context__ = FileNotFoundError(errno.ENOENT, "gone", "/a")
    assert told_in_one_line(caught) is None  # it was dealt with


def test_a_lock_that_another_user_made_is_told(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).mkdir()
    refused = pytest.raises(UserError, match=r"run: cannot be written \(Is a directory: .*lock\)")
    with refused, exclusive(tmp_path / "run"):
        pass
