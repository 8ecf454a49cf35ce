"""`verify-shards`: whether a set or a loose folder is complete and valid; lists every fault."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_distill.cli.arguments import (
    add_config_arguments,
    add_threads_argument,
    config_of,
    number_from_zero,
    path_argument,
    positive_number,
)
from sdxl_distill.errors import ConfigError

if TYPE_CHECKING:
    from sdxl_distill.config.builder import BuilderConfig
    from sdxl_distill.shards.set_identity import NoiseRecipe
    from sdxl_distill.verify.whole_set import Verification

SUMMARY = "prove that a shard set is complete and valid"
HELP = """Prove that a shard set is complete and valid, without a GPU.

  verify_shards.py --cache-dir ./cache/teacher_predictions/teacher_v8
reads every byte: set record, manifest, indices, tars, digests, schema, finite values, and noise,
seeds and timesteps computed again. A loose folder of {hash}_{WxH}.safetensors can be verified too.
Exit code: 0 valid; 3 damaged; 4 does not belong together; 5 unreadable; 2 incomplete or no set."""
INTERRUPTED = "nothing was changed, run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    # The set, and how much of it is read.
    parser.add_argument(
        "--cache-dir", metavar="DIR", type=path_argument, required=True, help="folder of the set"
    )
    parser.add_argument(
        "--quick", action="store_true", help="manifest, indices and sizes only; tars stay closed"
    )
    # What it is compared with: other sets, and the teacher itself.
    parser.add_argument(
        "--against",
        metavar="DIR",
        type=path_argument,
        action="extend",
        nargs="+",
        default=[],
        help="other sets that it is joined with: same keys, draws, noise, timesteps; stale shards; "
        "'predictions/{a,b,c}' names three",
    )
    parser.add_argument(
        "--recompute",
        metavar="N",
        type=positive_number,
        help="run N random records through the teacher of --config again and compare",
    )
    parser.add_argument(
        "--recompute-seed",
        metavar="SEED",
        type=number_from_zero,
        help="choose the same records again",
    )
    add_config_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    add_threads_argument(parser)
    # What a folder without set.json does not say.
    loose = parser.add_argument_group("loose folders without set.json")
    loose.add_argument("--base-seed", type=int, help="base seed, to compute the seeds again")
    loose.add_argument("--min-timestep", type=int, default=0, help="(default: %(default)s)")
    loose.add_argument("--max-timestep", type=int, default=1000, help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Verify, print, and return the exit code of the worst finding."""
    config = None
    if arguments.config or arguments.overrides or arguments.print_config:
        from sdxl_distill.config.builder import BuilderConfig

        config = config_of(arguments, BuilderConfig)
        if config is None:
            return 0
    if arguments.recompute and config is None:
        raise ConfigError(
            "--recompute without --config",
            where="command line",
            action="add --config FILE: it names the teacher's checkpoint",
        )
    result = _verify(arguments, config)
    _compare(arguments, result)
    if config is not None and arguments.recompute:
        _recompute(arguments, config, result)
    if arguments.json:
        print(json.dumps(_to_json(arguments, result), indent=1))
    else:
        print(*result.findings, *result.notes, _last_line(arguments, result), sep="\n")
    return result.exit_code


def _verify(arguments: argparse.Namespace, config: BuilderConfig | None) -> Verification:
    """Verify the folder by itself; a folder that cannot be opened is a finding too."""
    from sdxl_distill.cli.progress_bar import progress_bar
    from sdxl_distill.loose.folder import is_loose
    from sdxl_distill.storage.location import Location
    from sdxl_distill.verify.finding import FindingList
    from sdxl_distill.verify.loose_folder import verify_loose
    from sdxl_distill.verify.whole_set import Verification, verify_set

    num_threads = arguments.threads
    result = Verification(Path(os.path.realpath(arguments.cache_dir)).name)
    findings = FindingList(result.set_id)
    with findings.collecting():
        location = Location(arguments.cache_dir)
        with location.open() as directory:
            loose = is_loose(directory.names())
        with progress_bar("verify", "file" if loose else "shard", hidden=arguments.json) as show:
            if loose:
                recipe = _recipe(arguments, config)
                result = verify_loose(
                    location, recipe=recipe, num_threads=num_threads, on_progress=show
                )
            else:
                result = verify_set(
                    location, quick=arguments.quick, num_threads=num_threads, on_progress=show
                )
    result.findings += findings.all()
    return result


def _recipe(arguments: argparse.Namespace, config: BuilderConfig | None) -> NoiseRecipe | None:
    """Return the recipe of a loose folder's seeds, if the command line gives one."""
    from sdxl_distill.core.noise import NOISE_ALGORITHM
    from sdxl_distill.shards.set_identity import NoiseRecipe

    if arguments.base_seed is not None:
        steps = arguments.min_timestep, arguments.max_timestep
        return NoiseRecipe(NOISE_ALGORITHM, arguments.base_seed, *steps)
    if config is None:
        return None
    cache = config.cache
    return NoiseRecipe(NOISE_ALGORITHM, cache.base_seed, cache.min_timestep, cache.max_timestep)


def _compare(arguments: argparse.Namespace, result: Verification) -> None:
    """Add the differences between the set and those of --against."""
    if not arguments.against:
        return
    from braceexpand import braceexpand

    from sdxl_distill.shards.shard_set import open_shard_set
    from sdxl_distill.verify.finding import FindingList
    from sdxl_distill.verify.siblings import compare_sets

    findings = FindingList(result.set_id)
    with findings.collecting(), open_shard_set(arguments.cache_dir) as shard_set:
        for place in chain.from_iterable(map(braceexpand, arguments.against)):
            with findings.collecting(), open_shard_set(place) as other:
                result.findings += compare_sets(shard_set, other)
    result.findings += findings.all()


def _recompute(arguments: argparse.Namespace, config: BuilderConfig, result: Verification) -> None:
    """Add the records that the teacher predicts differently today."""
    from sdxl_distill.cli.progress_bar import progress_bar
    from sdxl_distill.shards.shard_set import open_shard_set
    from sdxl_distill.verify.finding import FindingList
    from sdxl_distill.verify.recompute import recompute_records

    seed = arguments.recompute_seed
    seed = secrets.randbits(32) if seed is None else seed
    findings = FindingList(result.set_id)
    with (
        findings.collecting(),
        open_shard_set(arguments.cache_dir) as shard_set,
        progress_bar("recompute", "record", hidden=arguments.json) as show,
    ):
        done = recompute_records(config, shard_set, arguments.recompute, seed, show)
        result.findings += done.findings
        result.notes.append(
            f"{done.num_records} records computed again (--recompute-seed {seed}): predictions "
            f"differ by at most {done.largest_difference:.1e}"
        )
    result.findings += findings.all()


def _to_json(arguments: argparse.Namespace, result: Verification) -> dict[str, Any]:
    return {
        "set": result.set_id,
        "kind": result.kind,
        "path": arguments.cache_dir,
        "records": result.num_records,
        "shards": result.num_shards,
        "draws": result.num_draws,
        "bytes": result.num_bytes,
        "quick": arguments.quick,
        "valid": not result.findings,
        "exit_code": result.exit_code,
        "notes": result.notes,
        "findings": [finding.to_json() for finding in result.findings],
    }


def _last_line(arguments: argparse.Namespace, result: Verification) -> str:
    from sdxl_distill.cli.build_summary import format_bytes

    shards = f" in {_count(result.num_shards, 'shard')}" if result.num_shards else ""
    draws = f", {_count(result.num_draws, 'draw')}" if result.kind == "predictions" else ""
    if result.findings:
        verdict = f"NOT valid, {_count(len(result.findings), 'finding')}"
    elif not result.num_shards:
        verdict = "valid"  # loose files: nothing says how many there should be
    elif arguments.quick:
        verdict = "complete; tars were not read (--quick)"
    else:
        verdict = "complete and valid"
    return (
        f"{result.set_id}: {_count(result.num_records, 'record')}{shards}{draws}, "
        f"{format_bytes(result.num_bytes)}: {verdict}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
