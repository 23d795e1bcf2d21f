"""FFNet-SR: published sizes and keys, any input, tiles, folds, kernels, training, export."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ffnet_testing import randomise, relative_error, steps_side_by_side
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ffnet
import ffnet_kernels
from ffnet.layers import LayerNorm2d
from ffnet.super_resolution import NORMS, FFNetSR, _spans, sr_arguments, upscale


def small(**kwargs) -> FFNetSR:
    model = randomise(FFNetSR(**{"depth": 2, "dim": 8, **kwargs}))
    assert isinstance(model, FFNetSR)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "scale", "parameters"),
    [
        ("ffnet_sr_light", 2, 1_789_452),
        ("ffnet_sr_large", 2, 2_381_580),
        # Only the last convolution depends on the scale: 96·9 weights and a bias for each of 3·s² outputs.
        ("ffnet_sr_light", 3, 1_789_452 + (27 - 12) * (96 * 9 + 1)),
        ("ffnet_sr_large", 4, 2_381_580 + (48 - 12) * (96 * 9 + 1)),
    ],
)
def test_published_sizes(name, scale, parameters):
    assert ffnet.count_parameters(ffnet.create_model(name, scale=scale, device="meta")) == parameters


def test_keys():
    keys = {key: tuple(value.shape) for key, value in FFNetSR(device="meta").state_dict().items()}
    block = {
        "token_mixer.0": (96, 96, 1, 1), "token_mixer.1": (96, 1, 3, 3), "token_mixer.3": (96, 1, 3, 3),
        "channel_mixer.0": (96, 1, 3, 3), "channel_mixer.1": (192, 96, 1, 1), "channel_mixer.3": (96, 192, 1, 1),
    }  # fmt: skip
    weights = {"proj": (96, 3, 3, 3), "conv_bef_up": (12, 96, 3, 3)}
    weights |= {f"body.{i}.{name}": shape for i in range(36) for name, shape in block.items()}
    expected = {f"{name}.weight": shape for name, shape in weights.items()}
    assert keys == expected | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def test_a_norm_shifts_the_indices():
    layer, batch = (FFNetSR(depth=1, dim=4, norm=norm).body[0] for norm in ("layer", "batch"))
    for mixer, query in ((layer.token_mixer, (4, 4, 1, 1)), (layer.channel_mixer, (4, 1, 3, 3))):
        assert list(dict(mixer.named_children())) == list("01234")
        assert isinstance(getattr(mixer, "0"), LayerNorm2d)
        assert getattr(mixer, "1").weight.shape == query
    for mixer in (batch.token_mixer, batch.channel_mixer):
        assert isinstance(getattr(mixer, "1"), nn.BatchNorm2d)


@pytest.mark.parametrize("scale", [2, 3, 4])
@torch.no_grad()
def test_what_it_computes(scale):
    model = small(depth=1, scale=scale).double()
    state, x = model.state_dict(), torch.rand(2, 3, 5, 7, dtype=torch.float64)

    def conv(name: str, z: torch.Tensor, groups: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(z, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2, groups=groups)

    z = conv("proj", x)
    token, channel = "body.0.token_mixer", "body.0.channel_mixer"
    z = z + conv(f"{token}.3", F.gelu(conv(f"{token}.1", conv(f"{token}.0", z), 8)), 8)
    z = z + conv(f"{channel}.3", F.gelu(conv(f"{channel}.1", conv(f"{channel}.0", z, 8))))
    # Pixels of a channel are next to each other in its s² planes; without details this is the nearest neighbour.
    details = F.pixel_shuffle(conv("conv_bef_up", z), scale)
    assert relative_error(model(x), details + F.interpolate(x, scale_factor=scale, mode="nearest")) < 1e-13


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (17, 5)])
@torch.no_grad()
def test_any_size(size):
    assert small(scale=3)(torch.rand(1, 3, *size)).shape == (1, 3, 3 * size[0], 3 * size[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(40, 53), (7, 64)])
@pytest.mark.parametrize("tile", [5, 16])
@torch.no_grad()
def test_tiles_are_the_whole_picture(norm, size, tile):
    """At every pixel, borders and seams included, with the overlap of the receptive field."""
    model, x = small(norm=norm).double(), torch.rand(2, 3, *size, dtype=torch.float64)
    assert relative_error(upscale(model, x, tile=tile), model(x)) < 1e-13


@torch.no_grad()
def test_the_overlap_is_as_small_as_is_exact_and_less_shows_at_seams_only():
    model, x = small(depth=1).double(), torch.rand(1, 3, 30, 30, dtype=torch.float64)
    whole, radius = model(x), model.receptive_radius
    assert radius == 5
    less = (upscale(model, x, tile=15, overlap=2) - whole).abs().amax((0, 1))
    assert less.max() > 1e-6
    near = torch.zeros(60, 60, dtype=torch.bool)
    seam = slice(2 * (15 - radius), 2 * (15 + radius))
    near[seam], near[:, seam] = True, True
    assert less[~near].max() < 1e-13
    inexact = (upscale(model, x, tile=15, overlap=radius - 1) - whole).abs().max()
    assert inexact > 1e-9


@torch.no_grad()
def test_tiles_bound_what_the_network_sees():
    model, sizes = small(), []
    model.proj.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[2:]))
    upscale(model, torch.rand(1, 3, 90, 50), tile=20, overlap=3)
    assert len(sizes) == 5 * 3
    (size,) = set(sizes)
    assert max(size) <= 26
    sizes.clear()
    upscale(model, torch.rand(1, 3, 26, 50), tile=20, overlap=3)  # no higher than a tile with its overlap
    assert len(sizes) == 3


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bytes_become_bytes(tile, dtype):
    model, x = small(depth=1).to(dtype), torch.randint(256, (2, 3, 20, 31), dtype=torch.uint8)
    out = upscale(model, x, tile=tile)
    expected = (upscale(model, x.to(dtype) / 255, tile=tile).clamp(0, 1) * 255).round()
    assert (out.dtype, out.shape) == (torch.uint8, (2, 3, 40, 62))
    assert torch.equal(out, expected.to(torch.uint8))
    assert out.min() == 0  # where it would have wrapped around
    assert out.max() == 255


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 40))
def test_spans(length, tile, margin):
    """Every pixel is kept once, with all of its surroundings that are in the picture, and no tile reads too much."""
    spans = _spans(length, tile, margin)
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(length))
    for span in spans:
        assert max(span.start - margin, 0) >= span.first >= 0
        assert min(span.stop + margin, length) <= span.last <= length
        assert span.last - span.first == spans[0].last - spans[0].first <= tile + 2 * margin


def test_folds_in_float64():
    x = torch.rand(2, 3, 12, 9, dtype=torch.float64)
    for norm in NORMS:
        model = small(norm=norm).double()
        fused = ffnet.reparameterize(model)
        assert relative_error(fused(x), model(x)) < 1e-10
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        assert relative_error(ffnet.reparameterize(fused)(x), model(x)) < 1e-10
    faulty = small(norm="batch").double()
    fused = ffnet.reparameterize(faulty)
    getattr(faulty.body[1].channel_mixer, "1").running_mean[3] += 1e-3
    assert relative_error(fused(x), faulty(x)) > 1e-7


def fused_operators(model: nn.Module) -> list[str]:
    return [row.runs_on for row in ffnet_kernels.report(model).rows if row.is_fused]


@pytest.mark.parametrize("norm", NORMS)
@torch.inference_mode()
def test_optimised(norm):
    plain = small(norm=norm, dim=16)
    fast, x = ffnet_kernels.optimize(copy.deepcopy(plain)), torch.rand(1, 3, 40, 31)
    for _ in range(3):
        assert relative_error(fast(x), plain(x)) < 1e-4
    assert fused_operators(fast).count("ffnified_attention") == fused_operators(fast).count("channel_mixer") == 2
    assert relative_error(upscale(fast, x, tile=20), plain(x)) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", ["ffnet_sr_light", "ffnet_sr_large"])
@torch.inference_mode()
def test_whole_models_optimised(name):
    plain, x = ffnet.create_model(name).eval(), torch.rand(1, 3, 24, 32)
    fast = ffnet_kernels.optimize(copy.deepcopy(plain))
    for _ in range(3):
        assert relative_error(fast(x), plain(x)) < 1e-4
    assert fused_operators(fast).count("ffnified_attention") == len(plain.body)
    assert relative_error(ffnet.reparameterize(plain)(x), plain(x)) == 0  # there is nothing to fold


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_trains_the_same_when_optimised(norm):
    """From the second step on: in the first the modules run."""
    plain = small(norm=norm, dim=16).train()
    fast = ffnet_kernels.optimize(copy.deepcopy(plain))
    for _ in steps_side_by_side((plain, fast), torch.rand(3, 4, 3, 12, 12)):
        for own, other in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_exports():
    model, x = small(), torch.rand(1, 3, 9, 12)
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: height, 3: width},)).module()
    torch.testing.assert_close(program(x), model(x))
    other = torch.rand(1, 3, 5, 20)
    torch.testing.assert_close(program(other), model(other))


@pytest.mark.parametrize("norm", NORMS)
def test_arguments_from_weights(norm):
    arguments = {"scale": 3, "depth": 3, "dim": 6, "expansion": 7 / 6, "norm": norm, "in_chans": 1}
    model = FFNetSR(**arguments)
    assert sr_arguments(model.state_dict()) == arguments
    assert sr_arguments(ffnet.reparameterize(model).state_dict()) == arguments
    ffnet.create_model("ffnet_sr_light", **arguments).load_state_dict(FFNetSR(**arguments).state_dict())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 5}, "scale of 2, 3 or 4, got 5"),
        ({"scale": 1}, "scale of 2, 3 or 4, got 1"),
        ({"norm": "group"}, "norm 'none', 'layer' or 'batch', got 'group'"),
        ({"depth": 0}, "positive, got 0"),
        ({"expansion": 0.001}, "hidden width to be positive"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FFNetSR(**kwargs)


def test_bad_calls():
    model, x = small(), torch.rand(1, 3, 4, 4)
    for call, message in (
        (lambda: upscale(small().train(), x), "eval mode"),
        (lambda: upscale(model, x[0]), r"\[N, 3, H, W\], got the shape \[3, 4, 4\]"),
        (lambda: upscale(model, x[:, :1]), r"got the shape \[1, 1, 4, 4\]"),
        (lambda: upscale(model, x[..., :0]), r"got the shape \[1, 3, 4, 0\]"),
        (lambda: upscale(model, x, tile=0), "tile of at least 1 pixel, got 0"),
        (lambda: upscale(model, x, tile=2, overlap=-1), "overlap of 0 or more pixels, got -1"),
        (lambda: sr_arguments(ffnet.create_model("ffnet_1", device="meta").state_dict()), "no weights of FFNet-SR"),
        (lambda: sr_arguments({}), "no weights of FFNet-SR"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
