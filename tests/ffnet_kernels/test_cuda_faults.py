"""The CUDA kernels, run on the processor under sanitizers, and proofs that these and parity see planted faults."""

import os
import shutil
import subprocess
import sys

import native_build
import patience
import pytest

pytestmark = pytest.mark.long

CHECK = f"""
import sys
sys.path[:0] = [{str(native_build.ROOT)!r}, {str(native_build.ROOT / "tests" / "ffnet_kernels")!r}]
import cuda_cases, parity, torch
from examples import example
torch.set_num_threads(1)
assert cuda_cases.on_the_host
"""
#: One case in so many of the tables, of changing dtypes.
SOME = """
for name, dtype in cuda_cases.CASES[::{step}]:
    case, layout, options = cuda_cases.made(name, dtype)
    with cuda_cases.machine(**options):
        parity.check(case, "cuda")
        parity.check_gradients(case, "cuda", layout=layout)
print("checked", len(cuda_cases.CASES[::{step}]))
"""
#: The host tells threads that meet nowhere; whatever else comes is what a kernel computes.
EACH = """
def check(name, case, gradients):
    try:
        (parity.check_gradients if gradients else parity.check)(case, "cuda")
        print(name, "passed")
    except (AssertionError, RuntimeError) as error:
        print(name, "failed:", str(error).splitlines()[0])

half = {"dtype": torch.float16, "shape": (2, 3, 19, 24), "kernel": (3, 3)}
check("channel_mixer", example("channel_mixer", **{**half, "shape": (2, 40, 9, 16)}, hidden=96), False)
check("stream", example("depthwise_conv2d", **half), False)
check("banded", example("depthwise_conv2d", **half, stride=2), False)
check("wgrad", example("depthwise_conv2d", **half, activation="none", multiplier=2), True)
check("gradients", example("depthwise_conv2d", **half), True)
check("phases", example("ffnified_attention", dtype=torch.float16, shape=(17, 2, 8, 8), kernel=(7, 7)), True)
check("plane", example("depthwise_conv2d", dtype=torch.float16, shape=(17, 2, 8, 8), kernel=(7, 7)), False)
check("linear", example("depthwise_conv2d", dtype=torch.float16, shape=(3, 5, 7, 7), kernel=(7, 7)), False)
with cuda_cases.machine(multiprocessors=1, resident_blocks=1):
    check("split", example("depthwise_conv2d", dtype=torch.float16, shape=(33, 4, 9, 8), kernel=(7, 7)), False)
"""


def run(library, code: str, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment, "FFNET_KERNELS_CUDA_HOST": str(library), "OMP_NUM_THREADS": "1"}
    return patience.run([*command, sys.executable, "-c", CHECK + code], env=environment)


def run_with_threads_watched(library, code: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Under ThreadSanitizer: the process, and the reports that are about the kernels."""
    environment = {
        "LD_PRELOAD": native_build.runtime_library("libtsan.so"),
        "TSAN_OPTIONS": "exitcode=0:halt_on_error=0:report_signal_unsafe=0",
    }
    # It takes memory where it expects it, or not at all.
    fixed_places = ["setarch", "-R"] if shutil.which("setarch") else []
    result = run(library, code, environment, *fixed_places)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in result.stderr or "personality" in result.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {result.stderr.splitlines()[0]}")
    reports = result.stderr.split("==================\n")
    return result, [report for report in reports if "ThreadSanitizer" in report and "csrc/cuda/" in report]


@pytest.fixture(scope="module")
def with_addresses_watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("address")
    return folder, native_build.build_cuda_host(folder, "address")


@pytest.fixture(scope="module")
def with_threads_watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thread")
    return folder, native_build.build_cuda_host(folder, "thread")


def test_parity_with_addresses_watched(with_addresses_watched):
    result = run(with_addresses_watched[1], SOME.format(step=5), native_build.sanitizer_environment())
    assert result.returncode == 0, result.stderr[-4000:]
    assert "checked" in result.stdout


def test_a_read_past_a_plane_is_seen(with_addresses_watched):
    line = "p.x = plane(x.map, x.h, x.w)"
    faults = {"cuda/depthwise_stream.cu": (line, "p.x = plane(x.map, x.h + 1, x.w)")}
    library = native_build.build_cuda_host(with_addresses_watched[0], "address", faults)
    result = run(library, EACH, native_build.sanitizer_environment())
    assert result.returncode == 99, result.stderr[-4000:]
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "in depthwise_stream_kernel" in result.stderr or "depthwise_stream.cu" in result.stderr
    assert "stream passed" not in result.stdout


def test_a_read_past_planes_that_arrive_as_they_lie_is_seen(with_addresses_watched):
    faults = {"cuda/linear.h": ("bytes = bytes > 0 ? bytes : 0;", "bytes = 16;")}
    library = native_build.build_cuda_host(with_addresses_watched[0], "address", faults)
    result = run(library, EACH, native_build.sanitizer_environment())
    assert result.returncode == 99, result.stderr[-4000:]
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "in depthwise_stream_kernel" in result.stderr or "depthwise_stream.cu" in result.stderr  # where copies land
    assert "linear passed" not in result.stdout


def test_parity_with_threads_watched(with_threads_watched):
    result, reports = run_with_threads_watched(with_threads_watched[1], SOME.format(step=61) + EACH)
    assert result.returncode == 0, result.stderr[-4000:]
    assert reports == []
    assert result.stdout.count("passed") == 9, result.stdout


#: Faults in different kernels.
FAULTS = {
    # Weights are copied over the tile of x that slower warps still read.
    "cuda/channel_mixer.cu": ("sync_block(); float out[kRowTiles]", "float out[kRowTiles]"),
    "cuda/stream.h": (
        # Rows that other lanes have copied are read without a wait for them.
        ("wait_for_copies<Ring::kStages - 2>(); sync_warp();", "wait_for_copies<Ring::kStages - 2>();"),
        # The last panel of every split is left out, where there are several.
        ("best = {splits, a_split};", "best = {splits, a_split > 1 ? a_split - 1 : 1};"),
    ),
    # Of a pair of rows of which a plane has the first only, none is fetched.
    "cuda/schedule.h": ("last(pair) < 0 || FIRST + 2 * pair >= HEIGHT", "last(pair) < 0 || last(pair) >= HEIGHT"),
    # Rows that begin within 16 aligned bytes are read from where those begin.
    "cuda/linear.h": ("own + first_[half] % 16", "own"),
    # A tap row takes the row before its own.
    "cuda/filter_sums.h": ("kept_[(i + 1 + ky) % K]", "kept_[(i + ky) % K]"),
    # The same in a kernel whose later reads are collectives, which wait for all lanes anyway.
    "cuda/attention_backward_planes.cu": (
        "wait_for_copies<kChunks - 1 - y / kRowsAtOnce>(); sync_warp();",
        "wait_for_copies<kChunks - 1 - y / kRowsAtOnce>();",
    ),
    # Rows are read without a wait for the lane's own copies.
    "cuda/wgrad.cu": ("wait_for_copies<Tile::kAhead>();", ""),
    "cuda/banded.cu": ("const int ky = p.rows.tap(row, first + i);", "const int ky = p.rows.tap(row, first + i) + 1;"),
}


@pytest.fixture(scope="module")
def faulty(with_threads_watched):
    library = native_build.build_cuda_host(with_threads_watched[0], "thread", FAULTS)
    result, reports = run_with_threads_watched(library, EACH)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("passed") + result.stdout.count("failed") == 9
    return result.stdout, reports


@pytest.mark.parametrize("source", ["channel_mixer.cu", "stream.h", "attention_backward_planes.cu"])
def test_a_missing_barrier_is_seen(faulty, source):
    assert any("data race" in report and f"csrc/cuda/{source}" in report for report in faulty[1])


@pytest.mark.parametrize("kernel", ["banded", "wgrad", "gradients", "plane", "linear", "split"])
def test_a_wrong_tap_a_missing_wait_row_or_panel_is_seen(faulty, kernel):
    assert f"{kernel} failed:" in faulty[0]
