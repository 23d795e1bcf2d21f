"""The block on voxels, dense, and on those of spconv where it is installed."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import relative_error
from torch import nn

import ffnet
import ffnet_kernels
from ffnet.voxels import VoxelBlock


@torch.no_grad()
def randomised(block: VoxelBlock) -> VoxelBlock:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2.0)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return block.eval()


@pytest.mark.parametrize("kernel", [3, 5])
@torch.no_grad()
def test_dense(kernel):
    block = randomised(VoxelBlock(4, kernel)).double()
    x = torch.randn(2, 4, 3, 6, 5, dtype=torch.float64)
    token, channel = block.token_mixer, block.channel_mixer

    def on_features(module: nn.Module, z: torch.Tensor) -> torch.Tensor:
        return torch.stack([module.module(z[n].flatten(1).T).T.view(-1, *z.shape[2:]) for n in range(len(z))])

    def conv(module: nn.Module, z: torch.Tensor) -> torch.Tensor:
        return F.conv3d(z, module.weight, padding=kernel // 2)

    y = on_features(token.fc, on_features(token.norm, x))
    y = F.gelu(on_features(token.conv1_norm, conv(token.conv1, y)))
    z = x + on_features(token.conv2_norm, conv(token.conv2, y))
    y = on_features(channel.conv_norm, conv(channel.conv, on_features(channel.norm, z)))
    z = z + on_features(channel.fc2, F.gelu(on_features(channel.fc1, y)))
    assert relative_error(block(x), z) < 1e-12


@torch.no_grad()
def test_folds_in_float64():
    block, x = randomised(VoxelBlock(4)).double(), torch.randn(2, 4, 3, 6, 5, dtype=torch.float64)
    folded = ffnet.reparameterize(block)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
    assert relative_error(folded(x), block(x)) < 1e-10
    assert str(ffnet.reparameterize(folded)) == str(folded)
    block.channel_mixer.conv_norm.module.running_mean[2] += 1e-3
    assert relative_error(folded(x), block(x)) > 1e-8


def test_trains_exports_and_runs_optimised():
    block, x = randomised(VoxelBlock(8)), torch.randn(2, 8, 3, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))
        torch.testing.assert_close(ffnet_kernels.optimize(copy.deepcopy(block))(x), block(x))
    block.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="odd kernel, got 4"):
        VoxelBlock(8, 4)
    monkeypatch.setitem(sys.modules, "spconv", None)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    with pytest.raises(ImportError, match="need the package spconv"):
        VoxelBlock(8, sparse=True)


@torch.no_grad()
def test_sparse_is_dense_at_its_points():
    """With all voxels present, a submanifold convolution is the plain one; else absent voxels are zeros."""
    spconv = pytest.importorskip("spconv.pytorch")
    dense, sparse = randomised(VoxelBlock(4)), VoxelBlock(4, sparse=True).eval()
    state = dense.state_dict()
    for name, value in sparse.state_dict().items():
        if value.dim() == 5:  # spconv has [out, depth, height, width, in]
            state[name] = state[name].permute(0, 2, 3, 4, 1)
    sparse.load_state_dict(state)
    size, points = (3, 4, 5), torch.cartesian_prod(torch.tensor([0]), torch.arange(3), torch.arange(4), torch.arange(5))
    features = torch.randn(len(points), 4)
    x = spconv.SparseConvTensor(features, points.int(), size, 1)
    torch.testing.assert_close(sparse(x).dense(), dense(x.dense()), rtol=1e-4, atol=1e-4)

    kept = torch.randperm(len(points))[:20]
    few = spconv.SparseConvTensor(features[kept], points[kept].int(), size, 1)
    got = sparse.token_mixer(few)
    present = torch.zeros(1, 1, *size)
    present[0, 0][tuple(points[kept, 1:].T)] = 1.0
    token, z = dense.token_mixer, few.dense()
    z = token.fc(token.norm(z)) * present
    z = token.act(token.conv1_norm(token.conv1(z))) * present
    expected = token.conv2_norm(token.conv2(z)) * present
    torch.testing.assert_close(got.dense(), expected, rtol=1e-4, atol=1e-4)
