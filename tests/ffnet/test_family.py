"""What holds for every model of `ffnet list`, whatever its task, at full size or, of each kind, a small one."""

import copy

import pytest
import torch
from ffnet_testing import randomise, relative_error

import ffnet
import ffnet_kernels
from ffnet.registry import model_entry
from ffnet.voxels import VoxelBlock
from ffnet_kernels import native

needs_native = pytest.mark.skipif(bool(native.cpu_library_error()), reason="no native library was built")
TRUNK = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "stem_width": 8}
HYBRID = ("ffnified", "ffnified", "attention", "attention")
#: One of each kind.
SMALL = {
    "ffnet_2": TRUNK,
    "ffnet_1": {**TRUNK, "token_mixers": HYBRID},
    "ffnet_2_features": TRUNK,
    "ffnet_seg": TRUNK,
    "ffnet_seg_ade20k": {**TRUNK, "num_classes": 5, "head": {"width": 16, "align_width": 24, "blocks": 1}},
    "ffnet_2_upernet": {**TRUNK, "num_classes": 5, "width": 16},
    "ffnet_sr_light": {"depth": 1, "dim": 8},
    "ffnet_ts": {"variables": 3, "dim": 8},
}


def example(name: str, batch: int = 1, **factory) -> torch.Tensor:
    """Two pixels of an edge remain in the last stage, so that borders count, and one in the middle."""
    shape = (96, 3) if model_entry(name).task == "forecasting" else (3, 64, 96)
    return torch.randn(batch, *shape, **factory)


def difference(out, expected) -> float:
    pairs = zip(*([o] if isinstance(o, torch.Tensor) else o for o in (out, expected)), strict=True)
    return max(relative_error(own.double(), other.double()) for own, other in pairs)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ffnet.list_models())
@torch.no_grad()
def test_folds_and_kernels_at_full_size(name):
    more = {"variables": 3} if name == "ffnet_ts" else {}
    model = randomise(ffnet.create_model(name, **more)).eval()
    x = example(name)
    plain, fast = model(x), ffnet_kernels.optimize(copy.deepcopy(model))
    fast(x)
    found, model = fast(x), model.double()
    exact = model(x.double())
    assert difference(found, exact) <= 2 * difference(plain, exact) + 1e-6
    rows = ffnet_kernels.report(fast).rows if name != "ffnet_ts" else ffnet_kernels.report(fast.model.stages[0]).rows
    assert rows[0].runs_on == "a program"
    assert difference(ffnet.reparameterize(model)(x.double()), exact) < 1e-10
    assert {"folds", "kernels"} <= set(model_entry(name).checked.split(", "))


@pytest.mark.long
@needs_native
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_exported(name):
    """For any number of images or series."""
    model, x = randomise(ffnet.create_model(name, **SMALL[name])).eval(), example(name, 2)
    program = ffnet_kernels.export(model, x)
    assert "ffnet_kernels.ffnified_attention.default" in {str(node.target) for node in program.graph.nodes}
    for batch in (1, 19):  # PyTorch convolves small batches of series in another way
        more = example(name, batch)
        assert difference(program.module()(more), model(more)) < 1e-4


@pytest.mark.long
def test_voxels_exported():
    """They have nothing for an operator, which is said."""
    block, x = VoxelBlock(4).eval(), torch.randn(2, 4, 3, 4, 5)
    with pytest.raises(ValueError, match="nothing in the model is for an operator"):
        ffnet_kernels.export(block, x)
    assert difference(ffnet_kernels.export(block, x, operators=False).module()(x), block(x)) < 1e-5


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_state_dicts_go_both_ways(name, tmp_path):
    """Into another model of the name, plain or optimised, folded into folded, and by a file with a trainer's prefix."""
    model, x = randomise(ffnet.create_model(name, **SMALL[name])).eval(), example(name)
    expected, fast = model(x), ffnet_kernels.optimize(ffnet.create_model(name, **SMALL[name]).eval())
    fast(x)
    fast.load_state_dict(model.state_dict())
    assert difference(fast(x), expected) < 1e-4
    other = ffnet.create_model(name, **SMALL[name]).eval()
    other.load_state_dict(fast.state_dict())
    assert difference(other(x), expected) == 0
    folded = ffnet.reparameterize(model)
    target = ffnet.reparameterize(ffnet.create_model(name, **SMALL[name]).eval())
    target.load_state_dict(folded.state_dict())
    assert difference(target(x), folded(x)) == 0
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "model.pth")
    loaded = ffnet.create_model(name, checkpoint=tmp_path / "model.pth", **SMALL[name]).eval()
    assert difference(loaded(x), expected) == 0
