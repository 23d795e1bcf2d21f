"""A training step on paper."""

import math

import pytest
from ffnet_testing import small_ffnet

from ffnet import create_model
from ffnet.train.scale import Cluster, Work, anchor, exchange_seconds, main, measure_work, ring_seconds, step_on, table

CLUSTER = Cluster()
COUNTS = [8, 16, 32, 64, 128, 256, 512, 1024]


@pytest.fixture(scope="module")
def work():
    model = create_model("ffnet_2", device="meta")
    return measure_work(model, model.config["input_size"])


def test_work(work):
    assert work.parameters == 27_208_408  # as published for training
    assert work.macs == pytest.approx(6.003e9, rel=0.02)  # of the reparameterised model, which has no branches
    small = measure_work(small_ffnet(), (3, 64, 64))
    larger = measure_work(small_ffnet(), (3, 128, 128))
    assert larger.map_bytes / small.map_bytes == pytest.approx(4, rel=0.01)
    assert larger.calls == small.calls
    head = measure_work(small_ffnet(num_classes=110), (3, 64, 64))
    assert head.map_bytes - small.map_bytes == 100 * 2
    assert head.macs - small.macs == 100 * 64


def test_a_ring():
    assert ring_seconds(1e9, 1, 1e9, 1) == 0
    assert ring_seconds(1e9, 2, 1e9, 0) == pytest.approx(1)
    assert ring_seconds(1e9, 4, 1e9, 0.5) == pytest.approx(1.5 + 6 * 0.5)


def test_an_exchange_over_nodes():
    one = exchange_seconds(1e8, 8, CLUSTER)
    assert one == pytest.approx(2 * 7 / 8 * 1e8 / 450e9 + 4 * 14 * 10e-6)
    two = exchange_seconds(1e8, 16, CLUSTER)
    assert two - one == pytest.approx(1e8 / 8 / 50e9 + 4 * 2 * 10e-6)
    growing = [exchange_seconds(1e8, gpus, CLUSTER) for gpus in COUNTS]
    assert growing == sorted(growing)
    assert growing[-1] < 4 * growing[0]


def test_a_step(work):
    step = step_on(8, 128, work, CLUSTER)
    assert step.flops == 6 * work.macs * 128
    assert step.compute == pytest.approx(step.flops / (989e12 * 0.35) + step.memory_bytes / (3.35e12 * 0.8))
    assert step.seconds == step.compute + step.exposed
    assert step.images_per_second == pytest.approx(8 * 128 / step.seconds)
    assert step.exchanged_bytes == 2 * 7 / 8 * 4 * work.parameters
    assert step.node_read_bytes == pytest.approx(step.images_per_second * 115e3)
    assert step_on(1, 128, work, CLUSTER).efficiency == 1
    assert step_on(16, 128, work, CLUSTER).node_images_per_second < step.node_images_per_second


def test_what_cannot_hide_shows(work):
    slow = Cluster(between=1e8)
    step = step_on(64, 8, work, slow)
    assert step.exposed == pytest.approx(step.exchange - 0.8 * step.compute * 2 / 3)
    assert step.efficiency < 0.2


def test_few_images_are_bound_by_launches(work):
    step = step_on(8, 1, work, CLUSTER)
    assert step.compute == 3 * work.calls * CLUSTER.launch


@pytest.mark.parametrize(("gpus", "batch"), [(0, 1), (1, 0)])
def test_no_gpus_or_images(gpus, batch):
    with pytest.raises(ValueError, match="at least one GPU and one image"):
        step_on(gpus, batch, Work(1, 1, 1, 1), CLUSTER)


def test_the_tables_of_the_documentation(root, work, capsys):
    text = (root / "docs" / "training.md").read_text()
    assert table(work, COUNTS, CLUSTER, batch=128, total=None) in text
    assert table(work, COUNTS, CLUSTER, batch=None, total=4096) in text
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[0] in text.replace("\n", " ")


@pytest.mark.long
def test_the_anchor_is_measured():
    measured, predicted = anchor(1_000_000, repeats=3)
    assert 0 < measured < math.inf
    assert 0 < predicted < math.inf
