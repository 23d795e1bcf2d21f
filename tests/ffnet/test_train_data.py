"""Data of a training run: its layouts, what cannot be read, its order, and random changes."""

import io
import os
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from train_testing import make_images

from ffnet.train import augment
from ffnet.train.data import IGNORED, Images, StepSampler, eval_loader, train_loader
from ffnet.train.options import parse_train
from ffnet.train.sources import Digits, Folder, Shards, open_data, open_source

CONFIG = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bicubic", "crop_pct": 1.0}


def to_tensor(image):
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)


def plain_options(*more):
    return parse_train(["digits", *more])


@pytest.fixture
def folder(tmp_path):
    return make_images(tmp_path / "images")


def write_shard(path, samples):
    """A tar file of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    for part, count in (("train", 12), ("val", 4)):
        (tmp_path / part).mkdir()
        for shard in range(2):
            numbers = range(shard, count, 2)
            samples = [(f"d/{n:04}.{s}", c) for n in numbers for s, c in (("png", png(n)), ("cls", b"%d\n" % (n % 3)))]
            write_shard(tmp_path / part / f"{part}-{shard}.tar", samples)
    return tmp_path


def test_folders(folder):
    data = open_data(str(folder))
    assert data.classes == 3
    assert data.train.classes == data.val.classes == ["ape", "bee", "cow"]
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data.train.name(9).endswith("bee/001.png")
    assert data.train.image(9).mode == "RGB"
    elsewhere = folder.rename(folder.with_name("moved"))
    assert len(open_data(str(elsewhere / "train"), str(elsewhere / "val")).train) == 24


def test_a_held_out_part_without_some_classes(folder):
    for file in (folder / "val" / "bee").iterdir():
        file.unlink()
    (folder / "val" / "bee").rmdir()
    assert set(open_data(str(folder)).val.labels.tolist()) == {0, 2}


def test_shards(shards):
    data = open_data(str(shards))
    assert data.classes == 3
    assert len(data.train) == 12
    # Each picture says its own number.
    for index in range(12):
        number = np.array(data.train.image(index))[0, 0, 0]
        assert data.train.labels[index] == number % 3
        assert data.train.name(index).endswith(f"d/{number:04}")
    assert len(open_source(shards / "train" / "train-1*.tar")) == 6


@pytest.mark.parametrize("kept", [8192, 8192 + 600, 8192 + 100], ids=["between files", "in a file", "in a header"])
def test_a_shard_that_ends_too_early(shards, kept):
    path = shards / "train" / "train-1.tar"
    path.write_bytes(path.read_bytes()[:kept])
    source = Shards(sorted((shards / "train").glob("*.tar")))
    assert 6 < len(source) < 12
    assert any("train-1.tar is damaged after" in problem for problem in source.problems)
    for index in range(len(source)):
        source.image(index)


def test_samples_of_shards_that_lack_something(tmp_path):
    samples = [
        ("a.png", png(1)),
        ("a.cls", b"0"),
        ("b.png", png(2)),
        ("c.cls", b"1"),
        ("e.png", png(3)),
        ("e.cls", b"x"),
    ]
    source = Shards([write_shard(tmp_path / "x.tar", samples)])
    assert len(source) == 1
    assert [p.partition("sample ")[2] for p in source.problems] == [
        "b lacks its .cls",
        "c lacks its image",
        "e has no number in its .cls",
    ]


def layouts(root):
    (root / "empty").mkdir()
    make_images(root / "flat")
    for part in ("train", "val"):
        os.rename(root / "flat" / part, root / f"flat-{part}")
    (root / "flat-train").rename(root / "only")
    make_images(root / "hollow")
    for file in (root / "hollow" / "train" / "bee").iterdir():
        file.unlink()
    make_images(root / "more")
    (root / "more" / "val" / "dog").mkdir()
    (root / "files" / "train").mkdir(parents=True)
    (root / "files" / "val").mkdir()
    (root / "files" / "train" / "a.png").touch()
    (root / "text" / "train").mkdir(parents=True)
    (root / "text" / "val").mkdir()
    (root / "text" / "train" / "a.tar").write_text("no tar file")
    write_shard(root / "odd.tar", [("readme", b"x")])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("none", FileNotFoundError, "no folder"),
        ("empty", ValueError, "expected folders train and val .* got nothing"),
        ("only", ValueError, "expected folders train and val .* got ape, bee, cow"),
        ("hollow", ValueError, "no image in .*bee: expected files ending in .jpg"),
        ("more", ValueError, "classes that the training part lacks: dog"),
        ("files", ValueError, "expected a folder for each class, or .tar shards, got a.png"),
        ("text", ValueError, "no readable, uncompressed tar file"),
    ],
)
def test_wrong_layouts(tmp_path, data, error, message):
    layouts(tmp_path)
    with pytest.raises(error, match=message):
        open_data(str(tmp_path / data))


def test_patterns_and_shards_without_samples(tmp_path):
    layouts(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_source(tmp_path / "x-*.tar")
    with pytest.raises(ValueError, match="expected pairs of"):
        open_source(tmp_path / "odd*.tar")


def test_held_out_classes_beyond_those_of_training(shards):
    write_shard(shards / "val" / "more.tar", [("z.png", png(0)), ("z.cls", b"7")])
    with pytest.raises(ValueError, match="has class 7, the training part only 0 to 2"):
        open_data(str(shards))


def test_digits_hold_out_every_fifth():
    pytest.importorskip("sklearn")
    train, held_out = Digits(train=True), Digits(train=False)
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.image(0).size == (8, 8)
    assert set(held_out.labels.tolist()) == set(range(10))


def test_broken_images_are_named_and_replaced_in_training_only(folder):
    broken = [folder / "train" / "ape" / "003.png", folder / "train" / "ape" / "004.png"]
    broken[0].write_bytes(b"no picture")
    broken[1].write_bytes(broken[1].read_bytes()[:100])
    source = Folder(folder / "train")
    image, label, skipped = Images(source, to_tensor, train=True)[3, 0]
    assert torch.equal(image, to_tensor(source.image(5)))
    assert label == 0
    assert [text.partition(": ")[0] for text in skipped] == [str(path) for path in broken]
    image, label, skipped = Images(source, to_tensor, train=False)[3, 0]
    assert label == IGNORED
    assert len(skipped) == 1


def test_nothing_but_broken_images(folder):
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(OSError, match=r"images on end cannot be read; the first is .*ape/000\.png"):
        Images(Folder(folder / "train"), to_tensor, train=True)[0, 0]


def keys(sampler):
    return [key for batch in sampler for key in batch]


def test_every_epoch_is_another_order_of_all_images():
    epochs = [keys(StepSampler(24, 6, seed=1, start=4 * e, stop=4 * e + 4)) for e in range(2)]
    for epoch in epochs:
        assert sorted(index for index, _ in epoch) == list(range(24))
    assert [i for i, _ in epochs[0]] != [i for i, _ in epochs[1]]
    assert not {seed for _, seed in epochs[0]} & {seed for _, seed in epochs[1]}
    assert keys(StepSampler(24, 6, seed=2, start=0, stop=4)) != epochs[0]
    assert len({i for i, _ in keys(StepSampler(25, 6, seed=1, start=0, stop=4))}) == 24  # what is left is dropped


def test_the_order_is_that_of_one_process_from_its_start():
    whole = keys(StepSampler(30, 12, seed=1, start=0, stop=5))
    assert keys(StepSampler(30, 12, seed=1, start=3, stop=5)) == whole[36:]
    parts = [list(StepSampler(30, 12, seed=1, start=0, stop=5, rank=r, world=2, accumulate=3)) for r in range(2)]
    assert all(len(batch) == 2 for part in parts for batch in part)
    together = [key for s in range(5) for part in parts for batch in part[3 * s : 3 * s + 3] for key in batch]
    assert together == whole


@pytest.mark.parametrize(
    ("batch", "message"), [(10, "multiple of ranks × --accumulate = 2 × 2, got 10"), (40, "at most the 30 images")]
)
def test_batches_that_do_not_fit(batch, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(30, batch, seed=0, start=0, stop=1, world=2, accumulate=2)


@pytest.mark.parametrize("count", [7, 8, 9])
def test_evaluation_sees_every_image_once_on_ranks_of_equal_batches(count):
    pixels = [Image.new("RGB", (2, 2), (n, 0, 0)) for n in range(count)]
    source = types.SimpleNamespace(labels=np.arange(count), image=pixels.__getitem__)
    source_type = type(
        "Few", (), {"__len__": lambda self: count, "labels": source.labels, "image": lambda s, i: pixels[i]}
    )
    images = Images(source_type(), to_tensor, train=False)
    ranks = [list(eval_loader(images, 2, rank=rank, world=3)) for rank in range(3)]
    assert len({tuple(len(batch.labels) for batch in batches) for batches in ranks}) == 1
    labels = [label for batches in ranks for batch in batches for label in batch.labels.tolist()]
    assert sorted(label for label in labels if label != IGNORED) == list(range(count))


def test_batches_do_not_depend_on_data_processes_or_on_the_state_of_generators(folder):
    options = plain_options("--erasing", "0.5", "--flip", "0.5")
    images = Images(Folder(folder / "train"), augment.train_transform(options, CONFIG, 16), train=True)
    runs = []
    for workers, seed in ((0, 1), (2, 2)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        loader = train_loader(images, StepSampler(24, 6, seed=3, start=0, stop=4), workers=workers, pin=False)
        runs.append(list(loader))
        assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.fixture(params=["torchvision", "plain"])
def library(request, monkeypatch):
    if request.param == "torchvision" and not augment.has_torchvision():
        pytest.skip("no torchvision that fits this torch")
    monkeypatch.setattr(augment, "has_torchvision", lambda: request.param == "torchvision")


def test_transforms(library):
    options = plain_options("--erasing", "1", "--flip", "1", "--crop", "0.3")
    transform = augment.train_transform(options, CONFIG, 32)
    red = Image.new("RGB", (40, 60), (255, 0, 0))
    torch.manual_seed(0)
    first, second = transform(red), transform(red)
    torch.manual_seed(0)
    assert torch.equal(transform(red), first)
    assert not torch.equal(first, second)
    assert type(first) is torch.Tensor
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.float32
    erased = (first[0] != 2).float().mean().item()
    assert 0.01 < erased < 0.4


def test_a_flip_mirrors(library):
    pixels = np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], (32, 1, 3))
    whole, mirrored = (
        augment.train_transform(plain_options("--flip", p, "--crop", "1"), CONFIG, 32)(Image.fromarray(pixels))
        for p in ("0", "1")
    )
    assert (whole[0, :, -1] > whole[0, :, 0]).all()
    assert (mirrored[0, :, -1] < mirrored[0, :, 0]).all()


def test_rand_augment_needs_torchvision(monkeypatch):
    monkeypatch.setattr(augment, "has_torchvision", lambda: False)
    with pytest.raises(ImportError, match="--rand-augment 0"):
        augment.train_transform(plain_options("--rand-augment", "9"), CONFIG, 32)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing(library, mixup, cutmix):
    mixer = augment.Mixer(mixup, cutmix, 5)
    labels = torch.arange(4)
    images = labels.float()[:, None, None, None].expand(4, 3, 16, 16).contiguous()
    for _ in range(8):
        mixed, targets = mixer(images, labels)
        assert targets.shape == (4, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        # The mean of an image whose pixels are its label tells its mixture.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(5.0))
    assert torch.equal(images[:, 0, 0, 0], labels.float())


def test_no_mixing():
    images, labels = torch.zeros(4, 3, 2, 2), torch.arange(4)
    assert augment.Mixer(0, 0, 5)(images, labels) == (images, labels)
    assert augment.Mixer(1, 1, 5)(images[:1], labels[:1])[0].shape[0] == 1
