"""The cases count right, those of ``--shape`` too, and the work they build is the same for every contender."""

import dataclasses
import json

import pytest
import torch

import ffnet
import ffnet_kernels
from benchmarks import runner
from benchmarks.__main__ import main
from benchmarks.cases import (
    FAMILIES,
    GROWTH,
    GROWTH_FROM,
    OPERATORS,
    STAGE_DIMS,
    SUITES,
    LayerCase,
    MemberCase,
    ModelCase,
    OperatorCase,
    make,
    parameters,
    suite,
)
from benchmarks.contenders import CONTENDERS, Eager
from benchmarks.report import growth_table
from benchmarks.results import OURS, Measurement, Roofs, Row
from benchmarks.run import FOLDER
from benchmarks.work import ModelWork, build
from ffnet import create_model
from ffnet_kernels.__main__ import main as kernels_command


@pytest.mark.parametrize("quick", [True, False])
def test_names_tell_cases_apart(quick):
    cases = suite(SUITES, quick=quick)
    assert len({case.name for case in cases}) == len(set(cases)) == len(cases)


@pytest.mark.parametrize("name", SUITES)
def test_a_quick_suite_is_part_of_the_whole(name):
    quick, whole = suite(name, quick=True), suite(name)
    assert set(quick) <= set(whole)
    assert 0 < len(quick) < len(whole) or name == "train"


def test_growth_varies_one_dimension_at_a_time():
    for quick in (True, False):
        for case in suite("growth", quick=quick):
            start = GROWTH_FROM[case.operator]
            differing = [f.name for f in dataclasses.fields(case) if getattr(case, f.name) != getattr(start, f.name)]
            assert len(differing) <= 1
            assert set(differing) <= set(GROWTH)


def test_the_layers_are_where_their_paths_say():
    """A layer takes the map of its case, and the model's own layers get that map from an image."""
    met = {}
    model = create_model("ffnet_1", device="meta").eval()
    cases = suite("layers", "ffnet_1", quick=True)
    for case in cases:
        module = model.get_submodule(case.path)
        module.register_forward_pre_hook(lambda _, args, path=case.path: met.update({path: tuple(args[0].shape)}))
    model(torch.empty(1, 3, 256, 256, device="meta"))
    assert met == {case.path: (1, case.channels, case.size, case.size) for case in cases}


def test_the_operator_suite_covers_every_stage():
    cases = suite("ops")
    families = {
        (*shape, activation)
        for dims, kernels, activation in FAMILIES.values()
        for shape in zip(dims, (56, 28, 14, 7), kernels, strict=True)
    }
    assert {(c.channels, c.size, c.kernel, c.activation) for c in cases} >= families
    covered = {(case.operator, case.channels) for case in cases}
    assert covered >= {(op, dim) for op in OPERATORS for dims in STAGE_DIMS.values() for dim in dims}
    assert {(case.channels, case.size) for case in cases} >= {(384, 24)}
    assert {(case.batch, case.layout) for case in cases} == {
        (batch, layout) for batch in (1, 8) for layout in ("nchw", "channels_last")
    }


def test_filter():
    assert {case.operator for case in suite("ops", "channel_mixer")} == {"channel_mixer"}
    assert suite("ops", "no such case") == []


def test_the_stage_dims_are_those_of_the_models():
    for name, dims in STAGE_DIMS.items():
        assert [info["num_chs"] for info in create_model(name, device="meta").feature_info] == list(dims)


@pytest.mark.parametrize("operator", OPERATORS)
def test_counts_of_operators(operator):
    case = OperatorCase(operator, batch=2, channels=8, size=4, kernel=3)
    work = build(case)
    tensors = [value for value in work.arguments.values() if isinstance(value, torch.Tensor)]
    output = work.expected()
    assert case.bytes == 4 * (sum(tensor.numel() for tensor in tensors) + output.numel())
    weights = [tensor for tensor in tensors if tensor.dim() != 1 and tensor.shape[0] != case.batch]
    assert case.flops == 2 * case.batch * case.size**2 * sum(weight.numel() for weight in weights)


def test_counts_of_layers():
    case = LayerCase("ffnet_1", "stages.0.0.channel_mixer", 80, 64, batch=2)
    weights = 80 * 9 + 2 * 80 * 240
    assert case.flops == 2 * 2 * 64**2 * weights
    assert case.bytes == 4 * (weights + 80 + 240 + 80 + 2 * 2 * 80 * 64**2)


def test_counts_of_models():
    case = ModelCase("ffnet_1", batch=2)
    assert case.flops == pytest.approx(2 * 2 * 2.985e9, rel=1e-3)
    assert case.bytes == pytest.approx(4 * (13.66e6 + 2 * 3 * 256**2), rel=1e-3)


@pytest.mark.long
def test_counts_of_segmentation():
    (case,) = suite("dense", quick=True)
    assert case.name == "ffnet_seg_ade20k 512x512 b1 float32"
    outputs = 150 * 64**2
    fused = ffnet.count_parameters(ffnet.reparameterize(ffnet.create_model(case.model, device="meta")))
    assert case.bytes == 4 * (fused + 3 * 512**2 + outputs)


def test_counts_of_super_resolution():
    (case,) = suite("super-resolution", quick=True)
    assert case.name == "ffnet_sr_light 160x90 b1 float32"
    assert case.bytes == 4 * (1_789_452 + 3 * 160 * 90 * (1 + 2**2))
    weights = 1_789_452 - 96 - 12 - 36 * (96 * 5 + 192)  # but for the biases
    assert case.flops == 2 * 160 * 90 * weights


def test_counts_of_the_rest_of_the_family():
    voxels = MemberCase("voxel block", 2)
    assert voxels.name == "voxel block 64x24x24x24 b2 float32"
    weights = sum(p.numel() for p in make(voxels.model).parameters() if p.dim() > 1)
    assert voxels.flops == 2 * 2 * 24**3 * weights
    series = MemberCase("ffnet_ts", 1, "bfloat16")
    parameters = ffnet.count_parameters(ffnet.reparameterize(make(series.model)))
    assert series.bytes == 2 * (parameters + 7 * (96 + 96))


@pytest.mark.parametrize("name", ["ffnet_ts", "voxel block", "small"])
def test_works_of_the_family(name):
    """Of a model that is judged in float32, too: contenders agree, each in its layout, and a wrong one is told."""
    case = ModelCase("ffnet_1", 1, 64, reference="float32") if name == "small" else MemberCase(name, 1)
    work = build(case)
    expected, eager = work.expected(), work.plain("nchw").outputs()
    limit = work.error_limit(expected, eager)
    assert expected.dtype == torch.float64
    for contender in (CONTENDERS["ours"], Eager("nchw", "nchw"), Eager("channels-last", "channels_last")):
        program = contender.prepare(work)
        assert runner.largest_error(program.outputs(), expected) <= limit
    assert runner.largest_error(1.001 * eager, expected) > limit
    assert parameters(case).get("reference") == ("float32" if name == "small" else None)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_contenders_get_what_their_names_say(operator, layout):
    work = build(OperatorCase(operator, 1, 8, 6, 3, layout))
    expected = work.expected()
    for contender in (CONTENDERS["ours"], Eager("nchw", "nchw"), Eager("channels-last", "channels_last")):
        program = contender.prepare(work)
        torch.testing.assert_close(program.outputs().double(), expected, atol=1e-5, rtol=1e-5)
    arguments = work.fused().function.keywords
    filters = arguments.get("weight", arguments.get("key"))
    assert filters.stride(0) == 1
    map_ = arguments.get("x", arguments.get("query"))
    assert map_.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.preserve_format)
    assert work.fused().detail in ffnet_kernels.available_backends()


def test_work_is_the_same_in_every_run():
    case = OperatorCase("ffnified_attention", 1, 8, 6, 3)
    assert torch.equal(build(case).expected(), build(case).expected())


def test_model_work_times_the_first_batch_and_judges_all():
    model = create_model("ffnet_1", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5).eval()
    work = ModelWork(model, [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)])
    with torch.inference_mode():
        expected = work.expected()
        assert expected.shape == (4, 5)
        for program in (work.fused(), work.plain("nchw"), work.as_trained("channels_last")):
            torch.testing.assert_close(program.outputs().double(), expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(program(), program.outputs()[:2])


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch):
    monkeypatch.setattr(runner, "measure_roofs", lambda: Roofs({"float32": 100.0}, ((2**16, 50.0),)))


def names(capsys, *options):
    assert main(["run", *options, "--list"]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_command_makes_table_and_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "--shape", "32x6x10", "--kernel", "5", "--baselines", "eager nchw", "--samples", "2"]
    assert kernels_command(command) == 0
    text = capsys.readouterr().out
    for operator in OPERATORS:
        assert f"| {operator}" in text
    folder = tmp_path / FOLDER
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["case"].partition(" ")[2] for row in rows] == ["32x6x10 k5 b1 float32 channels_last"] * 3
    assert all(m["passed"] for row in rows for m in row["measurements"])
    assert (folder / "speedup-operator.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_every_combination_is_a_case(capsys):
    assert names(capsys, "--shape", "320x16x16") == [
        f"{operator} 320x16x16 k7 b1 float32 channels_last" for operator in OPERATORS
    ]
    options = ("--kernel", "3,31", "--batch", "1,8", "--operator", "depthwise_conv2d", "--dtype", "all")
    found = names(capsys, "--shape", "8x4x4,16X8x4".lower(), *options, "--layout", "nchw", "--direction", "all")
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 3 * 2
    assert "depthwise_conv2d 16x8x4 k31 b8 float16 nchw backward" in found
    assert names(capsys, "--shape", "8x4x4", "--filter", "mixer") == ["channel_mixer 8x4x4 k7 b1 float32 channels_last"]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", [4, 5])
def test_maps_need_not_be_square(operator, kernel):
    case = OperatorCase(operator, 2, 8, 3, kernel, width=9)
    work = build(case)
    (result,), (ours,), expected = work.plain("nchw").results(), work.fused().results(), work.expected()
    assert ours.shape == result.shape == case.shape == (2, 8, 3, 9)
    assert (ours.double() - expected).abs().max() <= work.error_limit(expected, result)


def test_counts_are_those_of_the_map():
    wide, square = OperatorCase("channel_mixer", 1, 8, 4, 3, width=9), OperatorCase("channel_mixer", 1, 8, 6, 3)
    assert (wide.flops, wide.bytes) == (square.flops, square.bytes)  # 36 pixels both
    assert parameters(wide)["width"] == 9
    assert "width" not in parameters(square)  # as results of record have it


def test_other_widths_are_no_growth():
    cases = suite("growth", quick=True)
    rows = [Row(c.name, c.flops, 1, (Measurement(OURS, samples_ms=(1.0,)),), parameters(c)) for c in cases]
    wide = OperatorCase("depthwise_conv2d", 4, 160, 32, 7, width=64)
    rows.append(Row(wide.name, wide.flops, 1, (Measurement(OURS, samples_ms=(9.0,)),), parameters(wide)))
    assert growth_table(rows) == growth_table(rows[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "7", "--dtype", "float32"], "expected --shape with --kernel, --dtype, such as --shape 320x16x16"),
        (["--shape", "8x4x4", "--suite", "ops"], "expected --shape or --suite, got both"),
        (["--shape", "8x4x4", "--base", "HEAD"], "expected --shape or --base, got both"),
        (["--shape", "8x4x4", "--filter", "none"], "no case of --shape has 'none' in its name"),
    ],
)
def test_options_that_make_no_sense(options, message, capsys):
    assert main(["run", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "320x16"], "expected channels x height x width, such as 320x16x16, got '320x16'"),
        (["--shape", "0x16x16"], "such as 320x16x16, got '0x16x16'"),
        (["--shape", "8x4x4", "--kernel", "0"], "expected a positive integer, got '0'"),
        (["--shape", "8x4x4", "--dtype", "float64"], "expected some of float32, bfloat16, float16, got 'float64'"),
    ],
)
def test_wrong_values(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["run", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
