"""`python -m ray_jobs.train` on a dataset with one damaged clip: what the user sees, on one rank and on two."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from datasets import make_spec
from test_corrupt import write_cut
from test_train import OPTIONS, Training

from fvlm import presets
from fvlm.data.corrupt import CORRUPT, Place
from fvlm.data.plan import Plan
from fvlm.data.shards import read_manifest

CLIPS, ROWS, STEPS = 24, 4, 2
SAMPLING = ("global_batch", "lanes", "window_steps")
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A dataset, and the number of its damaged clip: one that rank 1 of two takes in the first step.

    Rank 0 takes none, and it alone has a train.log.
    """
    spec, folder = make_spec(rows_per_row_group=ROWS), tmp_path_factory.mktemp("damaged")
    # Which places a step takes depends on the number of rows and the seed, not on what the rows hold.
    manifest = read_manifest(write_cut(folder / "whole", spec, CLIPS, []))
    data = presets.get("demo").data
    data = dataclasses.replace(data, **{key: OPTIONS[f"data.{key.replace('_', '-')}"] for key in SAMPLING})
    plan = Plan.of_config(manifest, dataclasses.replace(presets.get("demo"), data=data))
    place = Place(*(int(column[0, 0]) for column in plan.rows(0, 1, rank=1, world=2)))
    clip = place.group * ROWS + place.row
    return write_cut(folder / "damaged", spec, CLIPS, [clip]), clip


def run(data: Path, runs: Path, name: str, **changes: object) -> tuple[Training, int, str]:
    options = {"train.max-steps": STEPS} | {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    training = Training(data, runs, name, options)
    return training, *training.run()


def test_by_default_the_run_stops_with_shard_row_group_row_and_clip(damaged, tmp_path):
    data, clip = damaged
    _, code, output = run(data, tmp_path, "stop")
    assert code == 2, output
    (message,) = (line for line in output.splitlines() if line.startswith("error: "))
    where = f"shard-00000.parquet: row group {clip // ROWS}, row {clip % ROWS}, clip 'clip-{clip:05d}', frame 7"
    assert where in message and "Restore the shard" in message
    assert "Traceback" not in output
    assert not (tmp_path / "stop" / CORRUPT).exists()


@pytest.fixture(scope="module")
def replaced(damaged, tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, str]:
    """Two workers; the clip is one of rank 1's."""
    runs = tmp_path_factory.mktemp("runs")
    training, code, output = run(
        damaged[0], runs, "replaced", data__on_corrupt="replace", data__max_corrupt=0.1, scale__workers=2
    )
    assert code == 0, output
    return training, output


def test_a_clip_replaced_on_another_rank_is_logged_listed_and_counted_once(damaged, replaced):
    training, output = replaced
    clip = damaged[1]
    (listed,) = (training.folder / CORRUPT).read_text().splitlines()
    record = json.loads(listed)
    assert (record["file"], record["clip_id"]) == ("shard-00000.parquet", f"clip-{clip:05d}")
    assert (record["group"], record["row"]) == divmod(clip, ROWS)
    said = [line for line in output.splitlines() if f"clip 'clip-{clip:05d}'" in line]
    assert len(said) == 1 and f"clip {record['replaced_by']!r} stands in for it: " in said[0]
    log = (training.folder / "train.log").read_text()
    assert said[0] in log and log.count(f"clip 'clip-{clip:05d}'") == 1
    assert [(row["ingest/corrupt"], row["ingest/replaced"]) for row in training.rows()] == [(1, 1)] * STEPS
    assert log.splitlines()[-1].endswith(
        f"1 clips are known to be damaged, others stand in for them; listed in {training.folder / CORRUPT}"
    )


def test_more_than_the_limit_stop_the_next_start_before_ray_is_up(replaced):
    training, _ = replaced
    again = dataclasses.replace(
        training, changes=training.changes | {"data.max-corrupt": 0.001, "train.max-steps": STEPS + 1}
    )
    code, output = again.run()
    assert code == 2, output
    assert f"error: {training.folder / CORRUPT}: 1 of {CLIPS} clips are damaged, above --data.max-corrupt" in output
    assert again.saved_steps() == [STEPS]


@pytest.mark.long
def test_more_than_the_limit_end_a_run_on_two_ranks_with_the_reason(damaged, tmp_path):
    training, code, output = run(
        damaged[0], tmp_path, "limit", data__on_corrupt="replace", data__max_corrupt=0.001, scale__workers=2
    )
    assert code == 2, output
    (message,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "1 of 24 clips are damaged, above --data.max-corrupt 0.001 (a share of the dataset)" in message
    assert f"'clip-{damaged[1]:05d}'" in message and "raise the limit" in message
    assert "Traceback" not in output and training.rows() == []


def test_a_list_that_cannot_be_read_is_an_error_before_ray_is_up(damaged, replaced, tmp_path):
    training, _ = replaced
    (training.folder / CORRUPT).write_text("what?\n")
    training.changes["train.max-steps"] = STEPS + 1
    code, output = training.run()
    assert code == 2 and f"error: {training.folder / CORRUPT}: not a list of damaged clips" in output, output
