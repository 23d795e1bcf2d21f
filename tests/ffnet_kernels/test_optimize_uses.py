"""An optimised model is used like the model it was: copied, saved, loaded, traced, distributed, quantised."""

import collections
import copy
import io
import pickle

import edits
import parity
import pytest
import torch
from contract import (
    MODES,
    ZOO,
    Block,
    agree,
    compare,
    depthwise,
    every_model,
    outcome,
    quiet,
    randomised,
    sample,
    twins,
    used,
)
from torch import fx, nn

import ffnet_kernels as fk

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def parts(model):
    """All that can be asked of a model and its parts."""
    return {
        path: (
            type(m),
            m.training,
            sorted(key for key in vars(m) if not key.startswith("_")),
            {k: (p.shape, p.stride(), p.requires_grad, type(p)) for k, p in m.named_parameters(recurse=False)},
            {k: (b.shape, b.stride()) for k, b in m.named_buffers(recurse=False)},
            [
                len(hooks)
                for key, hooks in vars(m).items()
                if key.endswith("hooks") and isinstance(hooks, collections.OrderedDict)
            ],
            list(m._modules),
        )
        for path, m in model.named_modules(remove_duplicate=False)
    }


def everything(model):
    """`parts`, and the names of what is attached in private."""
    return parts(model), {path: set(vars(m)) for path, m in model.named_modules()}


# ---- The model itself ----


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_itself(name, training):
    torch.manual_seed(0)
    model = ZOO[name].make().train(training)
    text, facts = repr(model), parts(model)
    identities = [id(m) for m in model.modules()], [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()]
    values = {k: v.clone() for k, v in model.state_dict().items()}
    metadata = model.state_dict()._metadata
    assert fk.optimize(model) is model
    with torch.no_grad():
        model.eval()(sample(name))
    model.train(training)
    assert repr(model) == text
    assert parts(model) == facts
    assert identities == (
        [id(m) for m in model.modules()],
        [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()],
    )
    compare(dict(model.state_dict()), values)
    assert model.state_dict()._metadata == metadata
    assert all(p.grad is None for p in model.parameters())


@every_model
def test_restore_leaves_nothing(name):
    torch.manual_seed(0)
    model = ZOO[name].make()
    with torch.no_grad():
        model(sample(name))
    before = everything(model)
    for _ in range(2):
        assert fk.optimize(model) is model
        assert fk.optimize(model) is model
        with torch.no_grad():
            model(sample(name))
        assert fk.refresh(model) in (model, None)
        assert fk.restore(model) is model
        assert everything(model) == before
    assert fk.restore(model) is model


def test_restore_amid_edits():
    fast, plain = used("blocks")
    for change in ("method_patched", "forward_hook", "class_changed", "pruned"):
        for model in (plain, fast):
            edits.apply(edits.EDITS[change], model, 3)
    for restored in (fk.restore(fast), fk.optimize(fast), fk.restore(fast)):
        assert restored is fast
        for mode in MODES:
            agree(fast, plain, X, mode)


@pytest.mark.parametrize("function", ["optimize", "restore", "refresh", "report"])
@pytest.mark.parametrize("value", [None, 3, nn.ReLU, torch.relu])
def test_only_modules_are_taken(function, value):
    with pytest.raises(TypeError):
        getattr(fk, function)(value)


def test_the_report_names_layers_and_operators():
    model = nn.Sequential(
        collections.OrderedDict(large=depthwise(8, 7), act=nn.GELU(), dilated=depthwise(dilation=2), block=Block())
    ).eval()
    assert isinstance(str(fk.report(model)), str)
    text = str(fk.report(fk.optimize(model)))
    assert "large" in text
    assert "depthwise_conv2d" in text
    assert "dilat" in text
    model.large.register_forward_hook(lambda *args: None)
    assert str(fk.report(model)) != text
    assert "large" not in str(fk.report(fk.restore(model))) or "depthwise_conv2d" not in str(fk.report(model))


@parity.needs_native
def test_something_runs_on_operators():
    """Else all of these tests would pass with nothing optimised at all."""
    model = fk.optimize(nn.Sequential(depthwise(32, 7), nn.GELU(), depthwise(32, 7)).eval())
    x = torch.randn(1, 32, 56, 56)
    with torch.no_grad():
        model(x)
        with torch.profiler.profile() as profile:
            model(x)
    assert "aten::convolution" not in {event.key for event in profile.key_averages()}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("folds", [False, True])
def test_memory(folds):
    """One copy of the weights that folding changes, and none of the others."""
    layers = [nn.Sequential(nn.Conv2d(640, 640, 3), nn.BatchNorm2d(640) if folds else nn.ReLU()) for _ in range(4)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, 4096)).eval()
    size = sum(p.nbytes for p in layers[0].parameters()) * 4
    x = torch.randn(1, 640, 9, 9)
    with torch.no_grad():
        for _ in range(2):
            model(x)
        before = resident()
        fk.optimize(model)
        model(x), model(x)
    assert resident() - before < (1.3 if folds else 0.3) * size


# ---- Copies ----


def by_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": by_save,
    "EMA": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "deepcopy of a wrapper": lambda model: copy.deepcopy(nn.Sequential(model))[0],
}


@every_model
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_plain_models_of_their_own(name, how):
    fast, plain = used(name)
    copied, plain_copy = COPIES[how](fast), COPIES[how](plain)
    assert everything(copied) == everything(plain_copy)
    for mode in MODES:
        agree(copied, plain, sample(name), mode)
    for change in ("value_changed", "forward_hook", "method_patched"):
        edits.apply(edits.EDITS[change], copied, 3)
        edits.apply(edits.EDITS[change], plain_copy, 3)
    agree(copied, plain_copy, sample(name))
    agree(fast, plain, sample(name))
    for model in (fast, plain):
        edits.apply(edits.EDITS["value_changed"], model, 5)
    agree(copied, plain_copy, sample(name))
    agree(fk.optimize(copied), plain_copy, sample(name))
    agree(fast, plain, sample(name))


def test_a_shallow_copy():
    fast, plain = used("blocks")
    twin, plain_twin = copy.copy(fast), copy.copy(plain)
    for model in (twin, plain_twin):
        model._modules = dict(model._modules)
        model.append(nn.Tanh())
    for mode in MODES:
        agree(twin, plain_twin, X, mode)
        agree(fast, plain, X, mode)


def test_pickles_know_nothing_of_it():
    fast, plain = (randomised(nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.GELU())) for _ in range(2))
    fk.optimize(fast)
    with torch.no_grad():
        fast(X)
    data = pickle.dumps(fast)
    assert b"ffnet_kernels" not in data
    assert len(data) == len(pickle.dumps(plain))


@every_model
@pytest.mark.parametrize("assign", [False, True])
def test_states_go_both_ways(name, assign):
    fast, plain = used(name)
    torch.manual_seed(9)
    other = ZOO[name].make()
    plain.load_state_dict(other.state_dict())
    assert list(fast.load_state_dict(other.state_dict(), assign=assign)) == [[], []]
    for mode in MODES:
        agree(fast, plain, sample(name), mode)
    for model in (plain, fast):
        edits.apply(edits.EDITS["value_changed"], model, 4)
    plain.load_state_dict(copy.deepcopy(fast.state_dict()), strict=True)
    agree(fast, plain, sample(name))


@every_model
def test_states_can_be_stored_tensor_by_tensor(name):
    """As safetensors does, which refuses tensors that share memory or are no whole storage."""
    fast, plain = used(name)
    storages = collections.Counter(id(t.untyped_storage()._cdata) for t in fast.state_dict().values())
    assert storages.total() == len(plain.state_dict())
    for got, expected in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True):
        assert got.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
        assert got.is_contiguous() == expected.is_contiguous()


# ---- Traces ----


@every_model
def test_fx(name):
    fast, plain = used(name)
    graphs = [outcome(fx.symbolic_trace, model) for model in (fast, plain)]
    compare(*[g if isinstance(g, Exception) else g.code for g in graphs])
    if not isinstance(graphs[1], Exception):
        agree(*graphs, sample(name), "grad")
        agree(fk.optimize(graphs[0]), graphs[1], sample(name))


@every_model
@pytest.mark.parametrize("mode", MODES)
def test_jit_trace(name, mode):
    fast, plain = used(name)
    with quiet(), MODES[mode]():
        traces = [outcome(torch.jit.trace, model, sample(name)) for model in (fast, plain)]
    kinds = [t if isinstance(t, Exception) else [n.kind() for n in t.inlined_graph.nodes()] for t in traces]
    compare(*kinds)
    if not isinstance(traces[1], Exception):
        agree(*traces, sample(name), mode)


def test_jit_script():
    fast, plain = used("normalised layers")
    with quiet():
        scripts = [torch.jit.script(model) for model in (fast, plain)]
    assert scripts[0].code == scripts[1].code
    agree(*scripts, X)


@pytest.mark.parametrize("name", ["normalised layers", "mixers", "FFNet"])
@pytest.mark.parametrize("mode", ["no_grad", "grad"])
def test_export(name, mode):
    fast, plain = used(name)
    with quiet(), MODES[mode]():
        programs = [torch.export.export(model, (sample(name),)) for model in (fast, plain)]
    assert programs[0].graph_module.code == programs[1].graph_module.code
    assert list(programs[0].state_dict) == list(programs[1].state_dict)


@pytest.mark.parametrize("name", ["normalised layers", "blocks", "FFNet"])
@pytest.mark.parametrize("mode", MODES)
def test_compile(name, mode):
    fast, plain = used(name)
    torch._dynamo.reset()
    compiled = [torch.compile(model, backend="eager", fullgraph=True) for model in (fast, plain)]
    agree(*compiled, sample(name), mode)
    for model in (plain, fast):
        edits.apply(edits.EDITS["value_changed"], model, 1)
        edits.apply(edits.EDITS["attribute_changed"], model, 1)
    agree(*compiled, sample(name), mode)
    agree(fast, plain, sample(name), mode)


# ---- Devices, wrappers, quantisation ----


@every_model
def test_meta_and_back(name):
    values = ZOO[name].make().state_dict()
    fast, plain = twins(lambda: ZOO[name].make().to("meta"))
    agree(fast, plain, sample(name).to("meta"))
    for model in (plain, fast):
        model.to_empty(device="cpu").load_state_dict(values)
    for mode in MODES:
        agree(fast, plain, sample(name), mode)


def test_skip_init():
    fast, plain = twins(lambda: nn.utils.skip_init(nn.Conv2d, 8, 8, 3, groups=8).eval())
    for model in (plain, fast):
        nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
    agree(fast, plain, X)


@every_model
def test_data_parallel(name):
    fast, plain = used(name)
    for mode in MODES:
        agree(nn.DataParallel(fast), nn.DataParallel(plain), sample(name), mode)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_distributed(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for name in ("blocks", "FFNet"):
            fast, plain = (nn.parallel.DistributedDataParallel(model) for model in used(name))
            for mode in MODES:
                agree(fast, plain, sample(name), mode)
            for model in (plain, fast):
                edits.apply(edits.EDITS["value_changed"], model.module, 1)
                nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
            agree(fast, plain, sample(name))
    finally:
        distributed.destroy_process_group()


@every_model
def test_quantised(name):
    fast, plain = used(name)
    with quiet():
        got, expected = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True) for m in (fast, plain))
        agree(got, expected, sample(name))


def test_fused_by_torch():
    fast, plain = used("normalised layers")
    for model in (plain, fast):
        model[0] = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
        model[1] = nn.Identity()
    agree(fast, plain, X)


@every_model
def test_averaged_weights(name):
    fast, plain = used(name)
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in (fast, plain)]
    for step in range(2):
        for average, model in zip(averages, (fast, plain), strict=True):
            edits.apply(edits.EDITS["value_changed"], model, step)
            average.update_parameters(model)
        agree(*averages, sample(name))
    for model in (fast, plain):
        torch.manual_seed(0)
        torch.optim.swa_utils.update_bn([sample(name, 1), sample(name, 2)], model)
    agree(fast, plain, sample(name))
