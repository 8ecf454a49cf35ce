"""`unpack-shards`: a shard set becomes a loose folder of one file per record."""

from __future__ import annotations

import argparse

from sdxl_distill.cli.arguments import add_threads_argument, path_argument

SUMMARY = "turn a shard set into a loose folder of records"
HELP = """Turn a shard set into a loose folder: {hash}_{WxH}.safetensors, for later draws
{hash}_{WxH}_d{k}.safetensors, as unpacking its tars gives, and a copy of set.json.

Every byte is checked on the way. The set stays as it is; `pack-shards` is the way back."""
INTERRUPTED = "remove the unfinished output folder and run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--cache-dir", metavar="DIR", type=path_argument, required=True, help="folder of the set"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=path_argument, required=True, help="new or empty folder"
    )
    add_threads_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Unpack the set."""
    from sdxl_distill.cli.build_summary import format_bytes
    from sdxl_distill.cli.progress_bar import progress_bar
    from sdxl_distill.loose.unpack import unpack_set

    with progress_bar("unpack", "shard") as show:
        done = unpack_set(
            arguments.cache_dir, arguments.output, num_threads=arguments.threads, on_progress=show
        )
    print(f"{arguments.output}: {done.num_records:,} records, {format_bytes(done.num_bytes)}")
