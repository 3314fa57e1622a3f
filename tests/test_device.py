"""Batches on their way to the device that trains."""

from __future__ import annotations

import pytest
import torch

from fvlm.batch import Batch
from fvlm.train.device import on_device


def batches(count: int) -> list[Batch]:
    random = torch.Generator().manual_seed(0)
    shapes = (2, 3, 56, 56, 3), (2, 3, 4, 7, 7), (2, 16)
    return [
        Batch(
            torch.randint(256, shapes[0], dtype=torch.uint8, generator=random),
            torch.randn(shapes[1], generator=random).half(),
            torch.randint(100, shapes[2], generator=random),
            torch.randint(100, shapes[2], generator=random),
            (f"a{number}", f"b{number}"),
        ).check()
        for number in range(count)
    ]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_every_batch_arrives_whole_and_in_order_and_none_is_written_over(device):
    sent = batches(20)
    arrived = list(on_device(iter(sent), torch.device(device)))
    assert [batch.clip_ids for batch in arrived] == [batch.clip_ids for batch in sent]
    for there, here in zip(arrived, sent, strict=True):
        assert all(tensor.device.type == device for tensor in there.tensors())
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there.tensors(), here.tensors(), strict=True))


def test_a_batch_on_the_cpu_is_not_copied():
    (sent,) = batches(1)
    (arrived,) = on_device(iter([sent]), torch.device("cpu"))
    assert arrived.frames.data_ptr() == sent.frames.data_ptr()
