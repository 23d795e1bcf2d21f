"""README and docs: every snippet runs or says why not, every link leads somewhere, every generated part is current.

A block of code that cannot run here stands below ``<!-- not run: why -->``; it is compiled, and of shell commands
targets, extras, modules and options are looked up. ``<!-- needs: module -->`` runs where that module can be imported. A
block of text behind one of Python shows what that printed.
"""

import contextlib
import importlib
import io
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import benchmarks.__main__
import ffnet
import ffnet.__main__
import ffnet_kernels
import ffnet_kernels.__main__
from benchmarks import contenders, run, runner
from benchmarks.results import Roofs

ROOT = Path(__file__).parents[1]
TABLES_OF_RESOURCES = ("cuda-resources.md", "triton-resources.md")  # tests of their own hold them
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if path.name not in (*TABLES_OF_RESOURCES, "CHANGELOG.md")
)
BLOCK = re.compile(r"^(?:<!-- (not run|needs): (.+) -->\n)?```(python|bash|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?:\]\(|(?:src|srcset)=\")([^)\"\s]+)")
LONGEST_README = 130
#: Command lines that run in this process, by the words that they begin with.
COMMANDS = {
    ("ffnet-kernels",): ffnet_kernels.__main__.main,
    ("python", "-m", "ffnet_kernels"): ffnet_kernels.__main__.main,
    ("ffnet",): ffnet.__main__.main,
    ("python", "-m", "ffnet"): ffnet.__main__.main,
    ("python", "-m", "benchmarks"): benchmarks.__main__.main,
}


class Block(NamedTuple):
    language: str
    text: str
    reason: str | None  # why it does not run
    needs: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text())
    return [
        Block(language, text, why if mark == "not run" else None, why if mark == "needs" else None)
        for mark, why, language, text in found
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(block: Block) -> list[list[str]]:
    """The words of each command: of lines, and between `&&`; settings of the environment in front are left out."""
    lines = re.sub(r"\\\n", " ", block.text).splitlines()
    words = [part for line in lines for part in parted(line.split("  #")[0].split(" # ")[0])]
    return [stripped for line in words if (stripped := strip_settings(line))]


def parted(line: str) -> Iterator[list[str]]:
    """The words of the commands of a line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
    lexer.whitespace_split = True
    for is_between, words in itertools.groupby(lexer, lambda word: word in ("&&", ";")):
        if not is_between:
            yield list(words)


def strip_settings(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words = words[1:]
    return words


def known_command(words: list[str]):
    """What runs it here, and its arguments; None where nothing does."""
    for start, main in COMMANDS.items():
        if tuple(words[: len(start)]) == start:
            return main, words[len(start) :]
    return None


def test_the_readme_stays_short():
    assert (ROOT / "README.md").read_text().count("\n") <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:|mailto:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Of the headings, as code hosts and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name)
def test_blocks_that_do_not_run_are_right_as_far_as_can_be_told(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, name(page), "exec")
        elif block.language == "bash":
            checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            assert checked.returncode == 0, checked.stderr
            for words in commands(block):
                check_command(words, may_be_foreign=block.reason is not None)


def check_command(words: list[str], *, may_be_foreign: bool) -> None:
    if words[0] == "make":
        rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {w for w in words[1:] if "=" not in w} <= set(rules), words
    elif words[0] == "pip":
        section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
        extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
        for word in words:
            for listed in re.findall(r"(?:ffnet-kernels|\.)\[([\w,-]+)\]", word):
                assert set(listed.split(",")) <= set(extras), words
    elif known_command(words) is None:
        assert may_be_foreign, f"nothing runs {words}: say why it is not run"


def test_every_option_in_the_docs_exists(monkeypatch, capsys):
    """Of commands that do not run: that their own parser takes them."""
    checked = 0
    for page in PAGES:
        for words in (words for block in blocks(page) if block.language == "bash" for words in commands(block)):
            known = known_command(words)
            if known is None or not (options := [w.split("=")[0] for w in known[1] if w.startswith("--")]):
                continue
            subcommand = [w for w in known[1][:1] if not w.startswith("-")]
            if known[0] is ffnet_kernels.__main__.main and subcommand == ["bench"]:
                subcommand = ["bench", "run"]
            with contextlib.suppress(SystemExit):
                known[0]([*subcommand, "--help"])
            text = capsys.readouterr().out
            assert all(re.search(rf"{option}\b", text) for option in options), (page, words)
            checked += 1
    assert checked > 5


def save(path: str, model: torch.nn.Module, prefix: str = "") -> None:
    torch.save({prefix + key: value for key, value in model.state_dict().items()}, path)


def picture(path: str) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path, format="PNG")


def for_models() -> dict:
    save("ffnet_1.pth", ffnet.create_model("ffnet_1"))
    save("detector.pth", ffnet.create_model("ffnet_1_features", out_indices=(1, 2, 3)), "backbone.")
    save("seg.pth", ffnet.create_model("ffnet_seg_ade20k"))
    Path("names.txt").write_text("".join(f"class {i}\n" for i in range(1000)))
    picture("IMAGE")
    return {"x": torch.randn(1, 3, 64, 64)}


def for_signals() -> dict:
    save("sr.pth", ffnet.create_model("ffnet_sr_light", scale=2))
    save("forecasting.pth", ffnet.create_model("ffnet_ts", variables=2, lookback=16, horizon=52))
    rows = "".join(f"week {i},{i % 7},{i % 5}\n" for i in range(40))
    Path("series.csv").write_text(f"week,first,second\n{rows}")
    picture("IMAGE")
    return {
        "picture": torch.rand(1, 3, 24, 20),
        "series": torch.randn(100, 7),
        "x": torch.randn(2, 8, 40),
        "weight": torch.randn(8, 1, 5),
        "bias": torch.randn(8),
    }


#: What snippets of a page find in their folder, and which names.
PREPARED = {"models.md": for_models, "signals.md": for_signals}


@pytest.fixture
def short_measurements(monkeypatch):
    """Benchmarks as in the page, with fewer samples and baselines; torch.compile has a test of its own."""
    few = (contenders.OURS, "eager nchw")
    monkeypatch.setattr(run, "DEFAULT_CONTENDERS", few)
    monkeypatch.setattr(run, "DEFAULT_SAMPLES", 2)
    monkeypatch.setattr(runner, "measure_roofs", lambda: Roofs({"float32": 100.0}, ((2**16, 50.0),)))


@pytest.mark.long
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language != "text" and b.reason is None for b in blocks(p))], ids=name
)
@pytest.mark.usefixtures("short_measurements")
def test_snippets_run(page, tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names, printed = {"__name__": "snippet", **PREPARED.get(page.name, dict)()}, ""  # classes are of that module
    ran = 0
    for block in blocks(page):
        if block.reason or (block.needs and not importable(block.needs)):
            continue
        if block.language == "text":
            missing = [line for line in block.text.splitlines() if line not in printed.splitlines()]
            assert not missing, f"the page shows what is not printed: {missing}\nprinted:\n{printed}"
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if block.language == "python":
                exec(compile(block.text, name(page), "exec"), names)
            else:
                for words in commands(block):
                    main, arguments = known_command(words)
                    assert main(arguments) == 0, words
        printed, ran = out.getvalue(), ran + 1
    assert ran


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError):  # torchvision, where it is made for another torch
        return False
    return True


@pytest.mark.long
def test_the_table_of_models_is_what_the_command_prints(capsys):
    assert ffnet.__main__.main(["list", "--markdown"]) == 0
    page = (ROOT / "docs" / "models.md").read_text()
    assert f"<!-- table: models -->\n{capsys.readouterr().out}<!-- end of table -->" in page


def test_the_pictures_are_what_their_tool_draws(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "draw_kernels.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 3
    for path in drawn:
        assert path.read_text() == (ROOT / "docs" / "pictures" / path.name).read_text(), path.name


def test_every_page_of_the_site_is_there():
    site = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w/-]+\.md)$", site.split("\nnav:\n")[1], re.MULTILINE)
    outside = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}  # made from files at the root
    assert len(listed) == len(set(listed))
    assert all((ROOT / "docs" / page).exists() for page in set(listed) - outside)


@pytest.mark.parametrize(("package", "constants"), [(ffnet_kernels, {"ACTIVATIONS", "training"}), (ffnet, set())])
def test_the_api_pages_have_every_public_name(package, constants):
    page = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text()
    listed = {entry.rpartition(".")[2] for entry in re.findall(r"^::: (.+)$", page, re.MULTILINE)}
    made = set(ffnet.list_models())  # by name, through create_model
    assert set(package.__all__) - constants - made <= listed


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def test_the_parser_of_blocks_can_fail():
    page = "```python\nx = (\n```\n\n<!-- not run: a GPU -->\n```bash\nmake nothing && ffnet --flag  # why\n```\n"
    found = [Block(language, text, why or None, None) for mark, why, language, text in BLOCK.findall(page)]
    assert [(b.language, b.reason) for b in found] == [("python", None), ("bash", "a GPU")]
    assert commands(found[1]) == [["make", "nothing"], ["ffnet", "--flag"]]
    with pytest.raises(AssertionError):
        check_command(["make", "nothing"], may_be_foreign=True)
    with pytest.raises(AssertionError):
        check_command(["wget", "all"], may_be_foreign=False)
    with pytest.raises(AssertionError):
        check_command(["pip", "install", ".[nothing]"], may_be_foreign=False)
