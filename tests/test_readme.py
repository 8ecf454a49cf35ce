"""What the pages show is true: their Python runs, their commands exist, their sizes are today's."""

from __future__ import annotations

import argparse
import gc
import re
import runpy
import shlex
import warnings
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support import disk_table
from support.shard_sets import ShardSets

from sdxl_distill.cli.main import COMMANDS
from sdxl_distill.export.diffusers_folder import use_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
FORMAT = (ROOT / "docs/format.md").read_text("utf-8")
SIZING = (ROOT / "docs/sizing.md").read_text("utf-8")
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
PAGES = ["README.md", "CONTRIBUTING.md", "docs/running.md"]


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text) if found == language]


def commands(page: str) -> list[list[str]]:
    """Return every command line of a page's bash blocks, cut into words."""
    text = "".join(blocks((ROOT / page).read_text("utf-8"), "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """Return our command and its arguments; None where a line calls something else."""
    for at, word in enumerate(words):
        script = re.fullmatch(r"(?:tools/)?(\w+)\.py", word)
        if script and (ROOT / word).is_file():
            return script[1].replace("_", "-"), words[at + 1 :]
        if word.endswith("sdxl-distill"):
            return words[at + 1], words[at + 2 :]
    return None


ALL_COMMANDS = [words for page in PAGES for words in commands(page)]
OUR_COMMANDS = [found for words in ALL_COMMANDS if (found := ours(words))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sets that the pages read, of a few small records each."""
    root = tmp_path_factory.mktemp("readme")
    sets = ShardSets(root / "cache", {(1024, 1024, 0): 12, (1024, 1024, 1): 12})
    sets.latents()
    for teacher in ("teacher_v8", "teacher_chaos"):
        sets.teacher(teacher, folder="teacher_predictions")
    return root


@pytest.mark.parametrize(
    ("page", "printed"),
    [(README, "1 steps in the first epoch"), (FORMAT, "_1024x1024 ")],
    ids=["stream", "webdataset"],
)
def test_the_python_that_reads_shards_runs(page, printed, cache, tmp_path, monkeypatch, capsys):
    [code] = [body for body in blocks(page, "python") if "teacher_predictions" in body]
    program = tmp_path / "program.py"
    program.write_text(code, "utf-8")
    monkeypatch.chdir(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        runpy.run_path(str(program))
        gc.collect()
    assert printed in capsys.readouterr().out


def test_the_readme_streams_in_ten_lines():
    [code] = [body for body in blocks(README, "python") if "JoinedStream" in body]
    assert len([line for line in code.splitlines() if line]) <= 10


def test_the_readme_uses_an_export_as_the_commands_say():
    [code] = [body for body in blocks(README, "python") if "from_pretrained" in body]
    assert code.strip() == use_of(".output/distill/distill_student_v1/export")


def test_pages_show_our_commands():
    assert {name for name, _ in OUR_COMMANDS} >= set(COMMANDS) - {"demo"}


@pytest.mark.parametrize(("name", "arguments"), OUR_COMMANDS, ids=lambda value: str(value)[:60])
def test_every_command_of_the_pages_is_one(name, arguments):
    assert name in COMMANDS
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_scripts_files_and_targets_of_the_pages_exist(words):
    if words[0] == "make":
        assert words[1] in TARGETS
    for word in words:
        if re.match(r"(tools|launch|tests)/", word) or word.endswith(".py"):
            assert (ROOT / word).is_file(), word


def test_the_disk_table_is_computed_from_todays_records():
    [table] = re.findall(r"<!-- disk table: .*? -->\n(.*?)\n<!-- end -->", SIZING, re.S)
    assert table == disk_table.table()


def test_each_further_draw_costs_what_the_page_says():
    sizes = [disk_table.predictions_bytes(1024, layout) for layout in ("full", "compact")]
    full, compact = (f"{disk_table.NUM_IMAGES * size / 1e9:.0f} GB" for size in sizes)
    assert f"{full} in `full` and {compact} in" in " ".join(SIZING.split())
    text = disk_table.NUM_IMAGES * disk_table.text_bytes(1024) / 1e9
    assert f"the text set ({text:.0f} GB)" in " ".join(SIZING.split())


def test_the_readme_says_what_three_teachers_take():
    [row] = re.findall(r"^\| 3 \|.*\| (\d+) \|$", disk_table.table(), re.M)
    assert f"three teachers of 100,000 images at 1024² take {row} GB" in " ".join(README.split())


def test_the_file_tree_names_every_place():
    [tree] = [body for body in blocks(README, "") if body.startswith("sdxl_distill/")]
    named = {word.strip("/;,") for word in tree.split()}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text("utf-8").splitlines()]
    top = [
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".")
        and not any(fnmatch(path.name, pattern) for pattern in [*ignored, "README.md"])
    ]
    package = [path.name for path in (ROOT / "sdxl_distill").glob("[a-z]*.py")]
    folders = [path.parent.name for path in (ROOT / "sdxl_distill").glob("*/__init__.py")]
    assert {*top, *package, *folders, "__main__.py"} - named == set()


def test_the_readme_leads_to_every_page():
    pages = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")]
    assert [page for page in pages if f"]({page})" not in README] == []


def test_the_readme_names_eight_files_to_read_first():
    part = README.partition("## Read these eight files first")[2].partition("\n## ")[0]
    files = re.findall(r"^\d\. `([\w/]+\.py)`", part, re.M)
    assert len(files) == 8
    assert [name for name in files if not (ROOT / "sdxl_distill" / name).is_file()] == []
