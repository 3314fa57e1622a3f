"""What follows a failure: how many ranks go on, what is said, what is given back, when a run is given up.

The processes are real and so is the cluster; the same training, killed for real, is in test_train and test_failures.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from fvlm import presets
from fvlm.config import Config, DataConfig, ScaleConfig, validate
from fvlm.errors import UserError
from ray_jobs.cluster import connect
from ray_jobs.supervise import StopRequest, most_ranks, release_places


def config(lanes: int = 8, **scale: object) -> Config:
    data = DataConfig(global_batch=16, lanes=lanes)
    return dataclasses.replace(presets.get("demo"), data=data, scale=ScaleConfig(**scale))


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": 1e9}


def test_only_numbers_of_ranks_that_share_the_lanes_evenly_are_allowed():
    assert config(workers=8, min_workers=1).rank_counts == [1, 2, 4, 8]
    assert config(workers=6, min_workers=2, lanes=12).rank_counts == [2, 3, 4, 6]
    assert config(workers=4).rank_counts == [4]
    with pytest.raises(UserError, match=r"--scale\.min-workers 3 is more than --scale\.workers 2"):
        validate(config(workers=2, min_workers=3))


@pytest.mark.parametrize(
    "nodes, on_gpu, wanted",
    [
        ([node(16)], False, 8),
        ([node(15)], False, 4),  # seven would fit, but do not share eight lanes
        ([node(4), node(4)], False, 4),  # a CPU for the step, another for decoding
        ([node(4)], False, 2),
        ([node(1)], False, 0),
        ([], False, 0),
        ([node(32, gpus=2), node(32, gpus=1)], True, 2),
        ([node(32, gpus=2), node(32, gpus=2)], True, 4),
        ([node(64)], True, 0),  # without a GPU
    ],
)
def test_as_many_ranks_go_on_as_the_nodes_have_room_for(nodes, on_gpu, wanted):
    assert most_ranks(config(workers=8, min_workers=1), on_gpu, nodes) == wanted


def test_a_rank_of_several_cpus_needs_them_on_one_node():
    assert most_ranks(config(workers=2, min_workers=1, cpus_per_worker=3), False, [node(2)] * 4) == 0
    assert most_ranks(config(workers=2, min_workers=1, cpus_per_worker=3), False, [node(4), node(4)]) == 2


def test_a_signal_is_remembered_and_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_reserved_for_ranks_is_given_back():
    with connect(num_cpus=2, object_store_bytes=80 << 20):
        ours = placement_group([{"CPU": 2}])
        ray.get(ours.ready(), timeout=30)
        assert ray.available_resources().get("CPU", 0) == 0
        release_places()
        deadline = time.monotonic() + 20
        while ray.available_resources().get("CPU", 0) < 2:
            assert time.monotonic() < deadline, placement_group_table()
            time.sleep(0.1)
        assert placement_group_table(ours)["state"] == "REMOVED"
