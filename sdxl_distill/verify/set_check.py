"""Verifies the files of a set that are not shards, and that they belong together.

Each function returns findings and raises no error of ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from itertools import chain, groupby
from typing import Final

from sdxl_distill.catalog.catalog import CATALOG_FOLDER
from sdxl_distill.core.noise import NOISE_ALGORITHM
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.shards.index_layout import ACTION
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME, SetFolder, shard_names
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location
from sdxl_distill.verify.finding import Finding, FindingList
from sdxl_distill.verify.record_values import RecordPlace, wrong_values

_FINISH: Final = "run its builder until it reports the set complete"


def read_identity(folder: SetFolder[Directory]) -> tuple[SetIdentity | None, list[Finding]]:
    """Read `set.json`; None when it is missing or damaged."""
    findings = FindingList(_folder_name(folder), SET_IDENTITY_NAME)
    with findings.collecting():
        try:
            content = folder.identity_bytes()
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no {SET_IDENTITY_NAME}",
                expected="the folder of a shard set, {output_dir}/{teacher_id}",
                action="check the path; if the set lost the file, copy it again",
            ) from error
        return SetIdentity.from_bytes(content, SET_IDENTITY_NAME), []
    return None, findings.all()


def read_manifest(folder: SetFolder[Directory]) -> tuple[Manifest | None, list[Finding]]:
    """Read `manifest.json`; None without a finding when there is none yet."""
    findings = FindingList(_folder_name(folder), MANIFEST_NAME)
    with findings.collecting():
        try:
            content = folder.manifest_bytes()
        except FileNotFoundError:
            return None, []
        return Manifest.from_bytes(content, MANIFEST_NAME), []
    return None, findings.all()


def incomplete(identity: SetIdentity, names: Collection[str]) -> tuple[list[ShardName], Finding]:
    """Return the committed shards of a set without a manifest, and the finding that says so."""
    shards = sorted(shard_names(names, identity.id))
    committed = [name for name in shards if name.idx in names]
    num_open = len(shards) - len(committed)
    error = ConfigError(
        f"the set is not complete: {len(committed)} shards are committed, {num_open} tars have "
        "no index yet",
        expected=f"a file {MANIFEST_NAME}",
        action=_FINISH,
    )
    return committed, Finding(error, identity.id)


def check_identity(identity: SetIdentity, manifest: Manifest) -> list[Finding]:
    """Check that manifest and set identity belong together, and that all draws have one source."""
    findings = FindingList(identity.id, MANIFEST_NAME)
    if manifest.identity != identity:
        found = manifest.identity
        findings.add(
            IncompatibleError(
                f"a manifest of generation {found.generation} of set {found.fingerprint[:12]}…",
                expected=f"generation {identity.generation} of {identity.fingerprint[:12]}…",
                action="finish building this set, or copy it again",
            )
        )
    for place, entries in groupby(manifest.shards, key=lambda entry: entry[:3]):
        if len({entry.source_sha256 for entry in entries}) > 1:
            width, height, number = place
            findings.add(
                IncompatibleError(
                    f"the draws of shard {number} of {width}x{height} were made from different "
                    "latents shards",
                    expected="one source",
                    action=ACTION,
                )
            )
    return findings.all()


def check_recipe(identity: SetIdentity) -> list[Finding]:
    """Check that noise and timesteps of a predictions set can be computed again here."""
    findings = FindingList(identity.id, SET_IDENTITY_NAME)
    recipe, schedule = identity.noise, identity.noise_schedule
    if recipe is None or schedule is None:
        return []
    if recipe.algorithm != NOISE_ALGORITHM:
        findings.add(
            IncompatibleError(
                f"noise algorithm {recipe.algorithm!r}",
                expected=f"{NOISE_ALGORITHM!r}, the one this version knows",
                action="verify with the version of sdxl_distill that built the set",
            )
        )
    if recipe.max_timestep > schedule.num_train_timesteps:
        findings.add(
            IncompatibleError(
                f"max_timestep {recipe.max_timestep}",
                expected=f"at most {schedule.num_train_timesteps}, the training timesteps",
                action="rebuild the set with a lower cache.max_timestep",
            )
        )
    return findings.all()


def check_strangers(
    identity: SetIdentity, names: Iterable[str], shards: Collection[ShardName], *, complete: bool
) -> list[Finding]:
    """Report files that do not belong to the set; names with a leading dot are the builders'."""
    known = {SET_IDENTITY_NAME, MANIFEST_NAME, *chain.from_iterable((s.tar, s.idx) for s in shards)}
    known |= {"latents": {CATALOG_FOLDER}, "text": {EMPTY_RECORD_NAME}}.get(identity.kind, set())
    findings = FindingList(identity.id)
    for name in sorted(set(names) - known):
        is_own = ShardName.parse(name, identity.id) is not None
        if name.startswith(".") or (is_own and not complete):
            continue
        findings.add(
            ConfigError(
                f"the folder holds {name!r}, which "
                + ("the manifest does not list" if is_own else "does not belong to the set"),
                action=_FINISH if is_own else "move it elsewhere",
            )
        )
    return findings.all()


def check_empty_record(
    folder: SetFolder[Directory], identity: SetIdentity, manifest: Manifest | None
) -> list[Finding]:
    """Check the embeddings of the empty caption, which a text set holds next to its shards."""
    findings = FindingList(identity.id, EMPTY_RECORD_NAME)
    with findings.collecting():
        try:
            content = folder.empty_record()
        except FileNotFoundError as error:
            raise CorruptError("is missing", expected="a file", action=ACTION) from error
        digest = hashlib.sha256(content).hexdigest()
        if manifest is not None and digest != manifest.empty_sha256:
            raise CorruptError(
                f"SHA-256 {digest[:12]}…",
                expected=f"{str(manifest.empty_sha256)[:12]}…, as the manifest says",
                action=ACTION,
            )
        header = RecordHeader.build(identity.schema, 8, 8, identity.fingerprint)
        if not content.startswith(header.content) or len(content) != header.record_bytes:
            raise CorruptError(
                "another header or size than a record of this set has",
                expected=f"{header.record_bytes} bytes, fingerprint {identity.fingerprint[:12]}…",
                action=ACTION,
            )
        place = RecordPlace("", 8, 8, 0)
        for error in wrong_values(header.decode(bytearray(content)), place, None, ACTION):
            findings.add(error)
    return findings.all()


def _folder_name(folder: SetFolder[Directory]) -> str:
    return Location(folder.where()).real().name
