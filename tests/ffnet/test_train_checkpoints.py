"""Checkpoints of a run: what is kept, what is damaged, and what is another run's."""

import json
import os
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from ffnet.train import checkpoints
from ffnet.train.checkpoints import CheckpointStore, DamagedCheckpoint, write_atomically
from ffnet.train.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def tensors(value, size=4):
    return {"model": {"weight": torch.full((size, 3), float(value)), "count": torch.tensor(value)}}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "run", ALONE, keep=2)
    for step in (10, 20):
        store.save(step, tensors(step), {"metric": None, "step": step})
    return store


def folder(store, step):
    return store.root / f"step-{step:09d}"


def test_reads_what_was_written(store):
    assert store.newest() == (20, {"metric": None, "step": 20})
    read = tensors(0)
    store.load(10, read)
    torch.testing.assert_close(read, tensors(10))
    store.load(20, read)
    torch.testing.assert_close(read, tensors(20))


def test_nothing_to_read(tmp_path):
    assert CheckpointStore(tmp_path / "new", ALONE, keep=1).newest() is None


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, ALONE, keep=2)
    for step, metric in enumerate((50.0, 90.0, None, 70.0, 90.0, None), start=1):
        store.save(step, tensors(step), {"metric": metric})
    assert store.steps() == [2, 5, 6]  # of two as good the first
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:09d}" for step in (2, 5, 6)}


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def other_facts(path):
    manifest = json.loads(path.read_text())
    manifest["content"]["facts"]["step"] = 7
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", os.remove, "manifest.json: .*No such file"),
        ("manifest.json", truncate, "manifest.json"),
        ("manifest.json", other_facts, "manifest.json: its checksum differs"),
        ("__0_0.distcp", os.remove, "__0_0.distcp is missing"),
        ("__0_0.distcp", truncate, "__0_0.distcp: expected [0-9]+ bytes, got [0-9]+"),
        ("__0_0.distcp", flip_a_bit, "__0_0.distcp: its checksum differs"),
        (".metadata", flip_a_bit, "metadata: its checksum differs"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_used(store, name, damage, message, capsys):
    damage(folder(store, 20) / name)
    with pytest.raises(DamagedCheckpoint, match=message):
        store.verify(20)
    assert store.newest()[0] == 10
    err = capsys.readouterr().err
    assert "step-000000020 is damaged" in err
    assert "trying the one before" in err


def test_files_of_another_checkpoint(store):
    shutil.copy(folder(store, 10) / "__0_0.distcp", folder(store, 20) / "__0_0.distcp")
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp"):
        store.verify(20)


def test_none_is_whole(store):
    for step in (10, 20):
        truncate(folder(store, step) / "__0_0.distcp")
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole; of the oldest: .*step-000000010"):
        store.newest()


def test_a_damaged_one_is_written_anew(store):
    truncate(folder(store, 20) / "__0_0.distcp")
    store.save(20, tensors(5), {})
    read = tensors(0)
    store.load(store.newest()[0], read)
    torch.testing.assert_close(read, tensors(5))


def test_another_models(store):
    with pytest.raises(ValueError, match=r"1 tensors differ; model.weight: expected \[5, 3\], got \[4, 3\]"):
        store.load(20, tensors(0, size=5))
    with pytest.raises(ValueError, match=r"other.x: expected \[1\], got nothing"):
        store.load(20, {"other": {"x": torch.zeros(1)}})


@pytest.mark.parametrize("moment", ["tensors", "manifest", "rename"])
def test_what_a_killed_process_leaves_is_no_checkpoint(store, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    place = {
        "tensors": (FileSystemWriter, "finish"),
        "manifest": (checkpoints, "_write_through"),
        "rename": (os, "rename"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*place[moment], kill)
        with pytest.raises((Killed, CheckpointException)):  # DCP passes on what its parts raise
            store.save(30, tensors(30), {})
    again = CheckpointStore(store.root, ALONE, keep=2)
    assert again.newest()[0] == 20
    assert again.steps() == [10, 20]
    assert {path.name for path in store.root.iterdir()} == {"step-000000010", "step-000000020"}


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    write_atomically(path, {"x": torch.ones(1)})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, {"x": torch.zeros(1)})
    assert torch.load(path)["x"] == 1
