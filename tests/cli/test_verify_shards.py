from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.verified_sets import VerifiedSets, cut, flip

from sdxl_distill.cli.main import main

TOOLS = Path(__file__).parents[2] / "tools"
SIZES = {(64, 64, 0): 3, (64, 128, 0): 2}


@pytest.fixture
def cache(tmp_path):
    return VerifiedSets(tmp_path, SIZES)


@pytest.fixture
def teacher(cache):
    return cache.build("full")


def verify(capsys, path, *options):
    """Return exit code and what was printed."""
    code = main(["verify-shards", "--cache-dir", str(path), *map(str, options)])
    return code, capsys.readouterr().out


def test_a_good_set_ends_with_one_line_and_exit_code_0(capsys, teacher):
    code, output = verify(capsys, teacher)
    assert code == 0
    assert output == ("teacher_a: 10 records in 4 shards, 2 draws, 41.0 kB: complete and valid\n")


def test_a_quick_verification_says_that_tars_were_not_read(capsys, teacher):
    code, output = verify(capsys, teacher, "--quick")
    assert (code, "complete; tars were not read (--quick)" in output) == (0, True)


def test_findings_are_printed_before_the_last_line(capsys, teacher):
    tar = next(teacher.glob("*-64x64-0*.tar"))
    flip(tar, 1800)
    code, output = verify(capsys, teacher)
    assert code == 3
    first, *_, last = output.splitlines()
    assert first.startswith(f"CorruptError: set teacher_a, {tar.name}, key ")
    assert last.endswith("NOT valid, 1 finding")


def test_the_exit_code_is_that_of_the_worst_finding(capsys, teacher):
    (teacher / "notes.txt").write_text("x")
    assert verify(capsys, teacher)[0] == 2
    cut(next(teacher.glob("*.tar")))
    assert verify(capsys, teacher)[0] == 3


def test_json_holds_every_finding_and_nothing_else_is_printed(capsys, teacher):
    (teacher / "notes.txt").write_text("x")
    code, output = verify(capsys, teacher, "--json")
    report = json.loads(output)
    assert (report["valid"], report["exit_code"], code) == (False, 2, 2)
    assert (report["set"], report["records"], report["shards"], report["draws"]) == (
        "teacher_a", 10, 4, 2,
    )  # fmt: skip
    (finding,) = report["findings"]
    assert finding["error"] == "ConfigError"
    assert finding["set"] == "teacher_a"
    assert "notes.txt" in finding["found"]
    assert finding["action"]


def test_a_missing_folder_is_a_finding_in_json_too(capsys, tmp_path):
    code, output = verify(capsys, tmp_path / "nothing", "--json")
    assert code == 2
    assert json.loads(output)["findings"][0]["found"] == "there is no such folder"


def test_a_set_is_compared_with_others(capsys, cache, teacher):
    other = cache.teacher("teacher_b", recipe={"base_seed": 1}, draws=2)
    assert verify(capsys, teacher, "--against", cache.root / "latents")[0] == 0
    code, output = verify(capsys, teacher, "--against", cache.root / "latents", other)
    assert code == 4
    assert "noise.base_seed 42; expected noise.base_seed 1" in output


def test_a_set_that_is_not_there_to_compare_with_is_a_finding_with_its_place(
    capsys, teacher, tmp_path
):
    code, output = verify(capsys, teacher, "--against", tmp_path / "nothing")
    assert code == 2
    assert str(tmp_path / "nothing") in output


def test_a_loose_folder_is_verified_by_the_same_command(capsys, teacher, tmp_path):
    loose = str(tmp_path / "loose")
    assert main(["unpack-shards", "--cache-dir", str(teacher), "--output", loose]) == 0
    capsys.readouterr()
    code, output = verify(capsys, loose)
    assert (code, output) == (0, "loose: 10 records, 2 draws, 21.7 kB: valid\n")
    (tmp_path / "loose" / "set.json").unlink()
    code, output = verify(capsys, loose)
    assert (code, "no base seed is known" in output) == (0, True)
    assert verify(capsys, loose, "--base-seed", 42)[0] == 0
    assert verify(capsys, loose, "--base-seed", 42, "--max-timestep", 10)[0] == 3


def test_unpacked_and_packed_again_is_the_same_set(capsys, teacher, tmp_path):
    loose, packed = str(tmp_path / "loose"), str(tmp_path / "packed")
    latents = str(tmp_path / "latents")
    main(["unpack-shards", "--cache-dir", str(teacher), "--output", loose])
    command = ["--input", loose, "--output", packed, "--latents", latents]
    assert main(["pack-shards", *command]) == 0
    assert "10 records in 4 shards" in capsys.readouterr().out
    for tar in teacher.glob("*.tar"):
        assert (tmp_path / "packed" / tar.name).read_bytes() == tar.read_bytes()
    assert main(["pack-shards", *command]) == 2  # nothing is overwritten


def test_recompute_without_a_configuration_is_refused(capsys, teacher):
    assert verify(capsys, teacher, "--recompute", 3)[0] == 2


@pytest.mark.parametrize("options", [("--threads", "0"), ("--recompute", "-1")])
def test_numbers_that_make_no_sense_are_refused(teacher, options):
    with pytest.raises(SystemExit) as stop:
        main(["verify-shards", "--cache-dir", str(teacher), *options])
    assert stop.value.code == 2


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tiny_family):
    """Latents, text and a compact teacher of three images, as the builders make them."""
    from support.photos import write_images
    from support.workshop import Workshop

    root = tmp_path_factory.mktemp("workshop")
    write_images(root / "images", 3)
    workshop = Workshop(root, tiny_family)
    workshop.build_latents()
    workshop.build_shards("cache.draws=2")
    return workshop


def test_sets_that_the_builders_made_are_valid_alone_and_together(capsys, workshop):
    paths = [workshop.latents, workshop.text, workshop.teacher]
    for path in paths:
        others = [other for other in paths if other != path]
        code, output = verify(capsys, path, "--against", *others)
        assert (code, output.count("\n")) == (0, 1), output


def test_random_records_are_computed_again_and_the_seed_is_printed(capsys, workshop, tiny_family):
    config = ("--config", workshop.config_file, "--recompute", 2, "--recompute-seed", 5)
    code, output = verify(capsys, workshop.teacher, *config)
    assert code == 0
    assert "2 records computed again (--recompute-seed 5): predictions differ by at most" in output
    other = f"teacher.checkpoint_path={tiny_family.teachers[1]}"
    code, output = verify(capsys, workshop.teacher, *config, "--set", other)
    assert (code, "another teacher" in output) == (4, True)


@pytest.mark.multiprocess
@pytest.mark.parametrize("tool", ["verify_shards", "pack_shards", "unpack_shards"])
def test_help_imports_nothing_heavy(tool):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{tool}', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(TOOLS / f'{tool}.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    print(sorted({'torch', 'numpy', 'tqdm', 'pydantic'} & set(sys.modules)))"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert "--threads" in output or tool == "pack_shards"
    assert output.splitlines()[-1] == "[]"
