"""FFNet with self-attention in some of its blocks."""

import copy

import pytest
import torch
from ffnet_testing import randomise, relative_error, small_ffnet

import ffnet
import ffnet_kernels
from ffnet.mixers import FusedAttention, MetaMixer, token_mixer

HYBRID = ("ffnified", "ffnified", ("ffnified", "attention"), "attention")


def hybrid(**kwargs) -> ffnet.FFNet:
    model = randomise(small_ffnet(token_mixers=HYBRID, layer_scale_init=1.0, **kwargs))
    assert isinstance(model, ffnet.FFNet)
    return model.eval()


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_the_fused_call_is_the_defining_form(heads):
    defining = randomise(ffnet.self_attention_mixer(6, heads)).double()
    fused = ffnet.self_attention_mixer(6, heads, fused=True).double()
    assert isinstance(fused, FusedAttention)
    fused.load_state_dict(defining.state_dict())
    for shape in ((2, 6, 5, 7), (1, 6, 1, 1), (0, 6, 2, 2)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(fused(x), defining(x), rtol=1e-12, atol=1e-12)


def test_which_blocks_have_it():
    model = hybrid()
    kinds = [
        [type(block.token_mixer[0].main) is MetaMixer for block in stage if hasattr(block, "token_mixer")]
        for stage in model.stages
    ]
    assert kinds == [[True], [True], [True, False], [False]]
    assert "stages.3.1.token_mixer.0.main.attention.k.proj.weight" in model.state_dict()
    plain = small_ffnet(layer_scale_init=1.0).state_dict()
    everywhere = small_ffnet(layer_scale_init=1.0, token_mixers=["ffnified"] * 4).state_dict()
    assert everywhere.keys() == plain.keys()


@pytest.mark.parametrize(("dim", "heads"), [(80, 2), (176, 4), (31, 1), (512, 16)])
def test_heads(dim, heads):
    assert token_mixer("attention", dim, 7, device="meta").attention.k.heads == heads


@torch.no_grad()
def test_folds_in_float64():
    model, x = hybrid().double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for extra_folds in (False, True):
        assert relative_error(ffnet.reparameterize(model, extra_folds=extra_folds)(x), model(x)) < 1e-10


@torch.inference_mode()
def test_optimised():
    plain, x = hybrid(dims=(16, 32, 64, 128)), torch.randn(2, 3, 64, 96)
    fast = ffnet_kernels.optimize(copy.deepcopy(plain))
    for _ in range(3):
        assert relative_error(fast(x), plain(x)) < 1e-4
    assert "ffnified_attention" in {row.runs_on for row in ffnet_kernels.report(fast).rows}


def test_trains():
    model = hybrid().train()
    x = torch.randn(4, 3, 32, 32)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.stages[3][1].token_mixer[0].main.attention.q.weight.grad.abs().max() > 0


@torch.no_grad()
def test_exports():
    model, x = hybrid(), torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("kinds", [("ffnified",) * 3, ("ffnified", "ffnified", "ffnified", "pooling"), ((),) * 4])
def test_bad_kinds(kinds):
    with pytest.raises(ValueError, match="token_mixers of ffnified, attention for each stage"):
        small_ffnet(token_mixers=kinds)
    with pytest.raises(ValueError, match="a token mixer of ffnified, attention, got 'pooling'"):
        token_mixer("pooling", 8, 3)
