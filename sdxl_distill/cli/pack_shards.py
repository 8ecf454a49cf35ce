"""`pack-shards`: a loose folder that `unpack-shards` wrote becomes a shard set again."""

from __future__ import annotations

import argparse

from sdxl_distill.cli.arguments import path_argument, positive_number

SUMMARY = "turn a loose folder of records into a shard set"
HELP = """Turn a loose folder of records into a shard set, byte for byte the one it came from.

The folder must hold the set.json that `unpack-shards` wrote: files made elsewhere do not say
which teacher, text encoders and latents they came from, and cannot be packed."""
INTERRUPTED = "remove the unfinished output folder and run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--input", metavar="DIR", type=path_argument, required=True, help="the loose folder"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=path_argument, required=True, help="new or empty folder"
    )
    parser.add_argument(
        "--latents",
        metavar="DIR",
        type=path_argument,
        help="the latents set that the records follow, shard by shard; may be left out for "
        "latents themselves, which follow the catalog that lies with them",
    )
    parser.add_argument(
        "--records-per-shard",
        metavar="N",
        type=positive_number,
        help="shard size for latents without a catalog, which are cut again (default: as before); "
        "images cannot be added to such a set",
    )


def run(arguments: argparse.Namespace) -> None:
    """Pack the folder."""
    from sdxl_distill.cli.build_summary import format_bytes
    from sdxl_distill.cli.progress_bar import progress_bar
    from sdxl_distill.loose.pack import pack_set

    with progress_bar("pack", "shard") as show:
        manifest = pack_set(
            arguments.input,
            arguments.output,
            arguments.latents,
            records_per_shard=arguments.records_per_shard,
            on_progress=show,
        )
    num_bytes = sum(entry.tar_bytes for entry in manifest.shards)
    print(
        f"{arguments.output}: {manifest.num_records:,} records in {len(manifest.shards):,} shards, "
        f"{format_bytes(num_bytes)}, complete"
    )
