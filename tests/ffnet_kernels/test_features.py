"""PyTorch's own features on optimised models, those that no other file has: docs/features.md lists all of them."""

import copy

import pytest
import torch
import torch.multiprocessing
from torch import nn

import ffnet_kernels as fk


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def maps(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- several processes ----


def train_in_step(rank: int, ranks: str, order: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{ranks}", rank=rank, world_size=2)
    model = make_model(seed=rank)  # DistributedDataParallel gives all the weights of the first
    if order == "optimize(DDP)":
        model = fk.optimize(nn.parallel.DistributedDataParallel(model))
    else:
        model = nn.parallel.DistributedDataParallel(fk.optimize(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(maps(4, 3, 12, 12, seed=10 * step + rank)).square().sum().backward()
        optimizer.step()
    torch.save([p.detach() for p in model.parameters()], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("order", ["optimize(DDP)", "DDP(optimize)"])
def test_replicas_train_together(order, tmp_path):
    torch.multiprocessing.spawn(train_in_step, (str(tmp_path / "ranks"), order, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, first, second))
    start = list(make_model(seed=0).parameters())
    assert not any(map(torch.equal, first[:1], start[:1]))  # it learned


def calls() -> dict:
    """Operators with their arguments, of two images and eight channels."""
    weight = {size: maps(8, 1, size, size, seed=size).mul_(0.2) for size in (3, 5)}
    matrix = maps(12, 8, seed=7).mul_(0.2)
    x, vector, hidden = maps(2, 8, 6, 7), maps(8, seed=8), maps(12, seed=9)
    return {
        "depthwise_conv2d": ((x, weight[5], vector), {"activation": "gelu"}),
        "two filters a channel": ((x, maps(16, 1, 3, 3), maps(16)), {"stride": 2}),
        "conv2d": ((x, maps(6, 8, 1, 1), maps(6)), {"activation": "relu"}),
        "ffnified_attention": ((x, weight[5], vector, weight[3], vector + 1), {"scale": vector, "residual": x + 1}),
        "channel_mixer": ((x, weight[3], vector, matrix, hidden, matrix.t(), vector), {"scale": vector, "residual": x}),
    }


def shard(rank: int, ranks: str) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{ranks}", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for name, (args, kwargs) in calls().items():
        function = getattr(fk, name, fk.depthwise_conv2d)
        for of_map in (Shard(0), Shard(1), Shard(2), Replicate()):
            for of_weights in (Replicate(), Shard(0)):

                def put(value, of_map=of_map, of_weights=of_weights):
                    if not isinstance(value, torch.Tensor):
                        return value
                    placement = of_map if value.dim() == 4 and value.shape[1] > 1 and value.shape[2] > 1 else of_weights
                    return distribute_tensor(value.contiguous(), mesh, [placement]).requires_grad_()

                results = []
                for place in (lambda v: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v, put):
                    given, named = [place(v) for v in args], {key: place(v) for key, v in kwargs.items()}
                    out = function(*given, **named)
                    out.square().sum().backward()
                    grads = [v.grad for v in (*given, *named.values()) if isinstance(v, torch.Tensor)]
                    results.append([v.full_tensor() if isinstance(v, DTensor) else v for v in (out.detach(), *grads)])
                splits = of_map.is_shard(0) or (of_map.is_shard(1) and name not in ("conv2d", "channel_mixer"))
                assert out.placements == ((of_map if splits else Replicate()),), (name, of_map, out.placements)
                for expected, found in zip(*results, strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"depthwise_conv2d: expected all tensors as DTensor.*: weight"):
        fk.depthwise_conv2d(distribute_tensor(maps(2, 8, 6, 7), mesh, [Shard(0)]), maps(8, 1, 3, 3))
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_distributed_tensors(tmp_path):
    """Split by images, by channels, or gathered; results and gradients as of whole tensors."""
    torch.multiprocessing.spawn(shard, (str(tmp_path / "ranks"),), nprocs=2)


# ---- torch.compile ----


class Counted:
    """A backend of torch.compile that counts the calls of what it made."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, inputs):
        def run(*args):
            self.calls += 1
            return module(*args)

        return run


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["torch.compile(m)", "m.compile()", "block.compile()"])
def test_what_was_compiled_stays_compiled(how, fresh_dynamo):
    model, x, counted = make_model().eval(), maps(2, 3, 16, 16), Counted()
    with torch.no_grad():
        expected = model(x)
        if how == "torch.compile(m)":
            model = torch.compile(model, backend=counted)
        elif how == "m.compile()":
            model.compile(backend=counted)
        else:
            model = nn.Sequential(model[:3], model[3:8], model[8:])
            model[1].compile(backend=counted)
        fk.optimize(model)
        for _ in range(3):
            before = counted.calls
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            assert counted.calls > before


# ---- both modes ----


def test_one_object_for_both_modes():
    """Batch normalisation is left in training where the model was optimised in evaluation, and the other way round."""
    model = fk.optimize(make_model().eval())
    plain = make_model().eval()
    x = maps(4, 3, 16, 16)
    for training in (False, True, False, True, False):
        model.train(training), plain.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 2
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)
    assert "channel_mixer" in str(fk.report(model)) or "cpu" not in fk.available_backends()


def test_frozen_batch_normalisation():
    """In a model in training mode: by running statistics, which stay, with gradients of all parameters."""
    models = fk.optimize(make_model()), make_model()
    x = maps(4, 3, 16, 16)
    for model in models:
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for _ in range(3):
            model.zero_grad()
            model(x).square().sum().backward()
    for found, expected in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)
    for found, expected in zip(*(model.buffers() for model in models), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("training", [False, True])
def test_swapped_activations(training):
    models = fk.optimize(make_model()), make_model()
    x = maps(4, 3, 16, 16)
    for swap in (nn.GELU, nn.ReLU, nn.Tanh):
        results = []
        for model in models:
            model.train(training)
            model[6] = swap()
            with torch.set_grad_enabled(training):
                results += [(model(x), model(x))]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- low-rank adapters ----


class Adapted(nn.Module):
    """A 1×1 convolution with a low-rank addition that is trained, as adapters are made by hand."""

    def __init__(self, base: nn.Conv2d, rank: int = 2):
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Conv2d(base.in_channels, rank, 1, bias=False),
            nn.Conv2d(rank, base.out_channels, 1, bias=False),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted(model: nn.Sequential) -> nn.Sequential:
    torch.manual_seed(3)
    model.requires_grad_(False)
    model[5] = Adapted(model[5])
    return model


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
def test_adapters_by_hand(when):
    plain = adapted(make_model().eval())
    x = maps(4, 3, 16, 16)
    model = make_model().eval()
    if when == "before":
        model = fk.optimize(adapted(model))
    else:
        fk.optimize(model)
        if when == "after a call":
            with torch.no_grad():
                model(x)
        model = adapted(model)
    for step in range(2):
        for m in (plain, model):
            m(x).square().sum().backward()
            torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1).step()
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[5].up.weight, plain[5].up.weight, rtol=1e-3, atol=1e-5)
        assert step or model[5].up.weight.grad.abs().sum() > 0


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_of_peft(when):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["5", "7"], init_lora_weights=False)

    def model(optimised: bool) -> nn.Module:
        base = make_model().eval()
        torch.manual_seed(4)
        if optimised and when == "before":
            return peft.get_peft_model(fk.optimize(base), config).eval()
        found = peft.get_peft_model(base, config).eval()
        return fk.optimize(found) if optimised else found

    plain, ours, x = model(False), model(True), maps(4, 3, 16, 16)
    for m in (plain, ours):
        m(x).square().sum().backward()
    grads = [[p.grad for p in m.parameters() if p.requires_grad] for m in (plain, ours)]
    assert len(grads[0]) == 4
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.merge_and_unload()(x), plain.merge_and_unload()(x), rtol=1e-4, atol=1e-5)


# ---- files ----


@pytest.mark.long
def test_onnx_by_tracing(tmp_path):
    """The exporter that torch.onnx had before, on an optimised model."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = fk.optimize(make_model().eval()), maps(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = fk.optimize(make_model(5).eval()), maps(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        safetensors.save_model(model, str(tmp_path / "model.safetensors"))
        other = fk.optimize(make_model(6).eval())
        assert not torch.allclose(other(x), expected)
        safetensors.load_model(other, str(tmp_path / "model.safetensors"))
        assert torch.equal(other(x), expected)


@pytest.mark.long
def test_quantisation_of_exported_programs():
    """pt2e quantises the convolutions of the body, too, of an optimised model's program."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, x = fk.optimize(make_model().eval()), maps(2, 3, 16, 16)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(fk.export(model, x, operators=False).module(), quantizer)
        prepared(x)
        converted = convert_pt2e(prepared)
        quantised = [node for node in converted.graph.nodes if "dequantize_per_channel" in str(node.target)]
        assert len(quantised) == 5  # every convolution and the head
        torch.testing.assert_close(converted(x), model(x), rtol=0.2, atol=0.05)


def test_deepcopy_of_a_trained_and_optimised_model_is_a_model_of_its_own():
    model, x = fk.optimize(make_model()), maps(4, 3, 16, 16)
    model(x).sum().backward()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
        model.eval(), average.eval()
        plain = make_model().eval()
        plain.load_state_dict(average.state_dict())
        torch.testing.assert_close(average(x), plain(x))
