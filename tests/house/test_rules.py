"""Each rule of the house finds what it is for: on a work tree that the test makes up."""

from __future__ import annotations

from pathlib import Path

import code_rules
import name_rules
import page_rules
import pytest
from rules import RULES, Rule, main, violations

LOSS = '"""Losses."""\n\nimport math\n\n\ndef mean(losses):\n    """Return it."""\n'
GOOD = {
    "sdxl_distill/core/loss.py": LOSS,
    "docs/architecture.md": (
        "```\ncli | core  all\n```\n| Loss? | `core` |\n## Modules\n\n- `core/loss.py`: `mean`\n"
    ),
    "pyproject.toml": 'layers = [\n  "cli | core",\n]\n',
    "docs/configuration.md": "### `data`\n\n| `lanes` | integer |\n",
    "docs/decisions/0001-first.md": (
        "# 0001 First\n**Context.** A.\n**Decision.** B.\n**Rejected.** C.\n**Consequences.** D.\n"
    ),
    "docs/determinism.md": "| `noise` |\n",
    "docs/glossary.md": "**teacher**: a model.\n**student**: another.\n",
    "tests/golden/noise.json": "{}",
    "tests/golden/noise.py": '"""Noise."""\n',
    "tests/support/__init__.py": "",
    "tests/test_mean.py": '"""Mean."""\n\n\ndef test_mean(): ...\n',
    "Makefile": "check:\n",
}
LONG = '"""Long."""\n\n\ndef long():\n' + "    do()\n" * 60
ENTRY = (
    '"""Loss."""\n\n\ndef loss(a):\n    """Return it.\n\n    Args:\n        a: of it.\n    """\n'
)
STEPS = (
    '"""Steps."""\n\n\ndef take(a):\n    """Take them.\n\n    Many.\n    """\n' + "    do()\n" * 29
)
HOME = "/ho" + "me/me/"

# Of each rule: the files that break it, and what it says then.
BROKEN: dict[Rule, tuple[dict[str, str], list[str]]] = {
    code_rules.module_docstrings: (
        {"train.py": "\n", "sdxl_distill/core/loss.py": '"""' + "Long.\n" * 7 + '"""\n'},
        [
            "sdxl_distill/core/loss.py:1: a docstring of 7 lines, at most 6",
            "train.py:1: a module without a docstring",
        ],
    ),
    code_rules.file_lengths: (
        {"tests/test_mean.py": '"""Mean."""\n' + "\n" * 400},
        ["tests/test_mean.py:401: a file of 401 lines, at most 400"],
    ),
    code_rules.function_lengths: (
        {"tests/test_mean.py": LONG},
        ["tests/test_mean.py:4: `long` has 61 lines, at most 60"],
    ),
    code_rules.meaningless_words: (
        {"sdxl_distill/core/loss.py": LOSS + "\n\nclass LossManager: ...\n"},
        ["sdxl_distill/core/loss.py:10: `LossManager` uses a word that says nothing"],
    ),
    code_rules.pure_imports: (
        {
            "sdxl_distill/core/loss.py": LOSS + "import sdxl_distill.clock\n",
            "sdxl_distill/clock.py": '"""Clock."""\n\n\ndef now():\n    import time\n',
        },
        ["sdxl_distill/clock.py:5: imports `time`, and core/ or order/ is built on this module"],
    ),
    code_rules.files_behind_the_door: (
        {
            "sdxl_distill/shards/tar.py": '"""Tars."""\n\nimport os\n\nos.open(x.descriptor)\n',
            "sdxl_distill/catalog/scan.py": '"""Images."""\n\nimport os\n',
        },
        [
            "sdxl_distill/shards/tar.py:3: uses `os`, and files of sets are local in storage/ only",
            "sdxl_distill/shards/tar.py:5: uses `descriptor`, and files of sets are local in "
            "storage/ only",
        ],
    ),
    code_rules.shared_test_packages: (
        {"tests/core/__init__.py": ""},
        ["tests/core/__init__.py:1: a package among the tests other than support/"],
    ),
    code_rules.modules_in_the_architecture: (
        {
            "docs/architecture.md": "`early.py`\n## Modules\n`core/loss.py` `core/loss.py`\n`b.py`",
            "sdxl_distill/core/noise.py": '"""Noise."""\n',
        },
        [
            "docs/architecture.md:3: lists `core/loss.py` twice",
            "docs/architecture.md:4: lists `b.py`, which is no module",
            "sdxl_distill/core/noise.py:1: not listed in docs/architecture.md, Modules",
        ],
    ),
    code_rules.layers_in_the_architecture: (
        {"docs/architecture.md": "# Layers\n```\ncli\ncore\n```\n"},
        [
            "docs/architecture.md:1: has no question that `core` answers",
            "docs/architecture.md:2: draws other layers than pyproject.toml has",
        ],
    ),
    code_rules.entries_that_are_phrases: (
        {"sdxl_distill/core/loss.py": ENTRY},
        ["sdxl_distill/core/loss.py:8: an entry that is no phrase: of it."],
    ),
    code_rules.step_comments: (
        {"sdxl_distill/core/loss.py": STEPS},
        ["sdxl_distill/core/loss.py:4: `take` has 30 lines of code and no comment"],
    ),
    page_rules.links: (
        {"README.md": "[a](docs/gone.md)\n[b](docs/architecture.md#gone)\n`[c](gone)`"},
        [
            "README.md:1: a link to `docs/gone.md`, which is not there",
            "README.md:2: a link to no heading, `docs/architecture.md#gone`",
        ],
    ),
    page_rules.cited_tests: (
        {"README.md": "`tests/test_mean.py::test_mean`\n`tests/test_mean.py::test_median`"},
        ["README.md:2: cites `tests/test_mean.py::test_median`, which is no test"],
    ),
    page_rules.cited_pages: (
        {"train.py": '"""Trains: docs/determinism.md, docs/training.md."""\n'},
        ["train.py:1: names `docs/training.md`, which is not there"],
    ),
    page_rules.cited_sections: (
        {"sdxl_distill/core/loss.py": '"""Losses.\n\ndocs/architecture.md, "Losses".\n"""\n'},
        ['sdxl_distill/core/loss.py:3: docs/architecture.md has no section "Losses"'],
    ),
    page_rules.decisions: (
        {"docs/decisions/0003-third.md": "# 0003 Third\n**Context.** A."},
        [
            "docs/decisions/0003-third.md:1: is not number 0002, in its name and heading",
            "docs/decisions/0003-third.md:1: lacks the parts "
            "Context, Decision, Rejected, Consequences",
        ],
    ),
    page_rules.glossary: (
        {"docs/glossary.md": "**teacher**: a model.\n**student, teacher**: another."},
        ['docs/glossary.md:2: explains "teacher" twice'],
    ),
    page_rules.golden_files: (
        {"tests/golden/loss.json": "{}", "docs/determinism.md": ""},
        [
            "tests/golden/loss:1: a golden file or its script, without the other",
            "tests/golden/noise.py:1: has no row in docs/determinism.md",
        ],
    ),
    page_rules.one_machine: (
        {"Makefile": f"check:\n\tls {HOME}models\n"},
        [f"Makefile:2: names a folder of one machine, {HOME}"],
    ),
    name_rules.names_on_pages: (
        {"README.md": "`mean` of `Column`\n\n`core/median.py`, `core/loss.py`"},
        [
            "README.md:1: `Column` is nothing that the code knows",
            "README.md:3: `core/median.py` is nothing that the code knows",
        ],
    ),
}


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_finds_what_breaks_it_and_nothing_else(rule, tmp_path):
    _write(tmp_path, GOOD)
    assert violations(tmp_path, (rule,)) == []
    files, said = BROKEN[rule]
    _write(tmp_path, files)
    assert [str(found) for found in violations(tmp_path, (rule,))] == said


def test_the_command_prints_what_it_finds_and_ends_with_1(tmp_path, capsys):
    _write(tmp_path, GOOD)
    assert main(tmp_path, every=True) == 0
    _write(tmp_path, {"README.md": "`Column`\n"})
    assert main(tmp_path, every=True) == 1
    assert "README.md:1: `Column` is nothing that the code knows" in capsys.readouterr().out


def test_a_file_that_cannot_be_parsed_is_named(tmp_path):
    _write(tmp_path, {**GOOD, "sdxl_distill/core/loss.py": "import\n"})
    [found] = violations(tmp_path)
    assert str(found).startswith("sdxl_distill/core/loss.py:1: is not Python")


CODE = {
    "sdxl_distill/order/stream_order.py": (
        '"""Order."""\n\n\nclass StreamOrder:\n    """It."""\n\n    num_steps: int\n\n'
        '    def batches(self, first_step):\n        """Yield."""\n'
        '        self._cache = "teacher_pred"\n'
    ),
    "sdxl_distill/cli/train.py": '"""Trains."""\n\nOPTION = "--resume"\nNAME = "manifest.json"\n',
    "Makefile": "check:\n\ntest-lowest:\n",
}


@pytest.mark.parametrize(
    "name",
    [
        *("StreamOrder", "StreamOrder.batches", "StreamOrder.num_steps", "stream_order"),
        *("first_step", "teacher_pred", "data.lanes", "order/stream_order.py", "stream_order.py"),
        *("sdxl_distill/cli/train.py", "make test-lowest", "train --resume latest", "num_"),
        *("manifest.json", "tests/support/", "cache/latents/set.json", "{key}_{W}x{H}", "C", "MLP"),
    ],
)
def test_a_name_that_the_code_knows_passes(name, tmp_path):
    _write(tmp_path, {**GOOD, **CODE, "README.md": f"`{name}`\n"})
    assert violations(tmp_path, (name_rules.names_on_pages,)) == []


@pytest.mark.parametrize(
    "name",
    [
        *("Schedule", "Schedule.batches", "StreamOrder.steps", "join_schedule", "data.rows"),
        *("builder/examination.py", "examination.py", "set_record.json", "tests/shared/"),
        *("make lint", "--continue", "_px"),
    ],
)
def test_a_name_that_the_code_does_not_know_is_found(name, tmp_path):
    _write(tmp_path, {**GOOD, **CODE, "docs/running.md": f"Before.\n`{name}`\n"})
    said = [str(found) for found in violations(tmp_path, (name_rules.names_on_pages,))]
    assert said == [f"docs/running.md:2: `{name}` is nothing that the code knows"]


def test_a_name_of_others_that_no_page_uses_need_not_be_listed(tmp_path):
    _write(tmp_path, {**GOOD, "tests/house/name_rules.py": '"""Names."""\n'})
    found = violations(tmp_path, (name_rules.names_on_pages,))
    assert len(found) == len(name_rules.NAMES_OF_OTHERS) > 0
    assert {each.path for each in found} == {"tests/house/name_rules.py"}
