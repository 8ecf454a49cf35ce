"""Verifies a loose folder: every file on its own, then all of them together.

There is no index and no manifest: damage that leaves a record's form and values plausible cannot
be seen. With `set.json` or a noise recipe, seeds and timesteps are computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from sdxl_distill.errors import ConfigError, CorruptError, DistillError, IncompatibleError
from sdxl_distill.limits import MAX_RECORD_BYTES, MAX_SIDECAR_BYTES
from sdxl_distill.loose.folder import LooseFolder, LooseRecord
from sdxl_distill.runtime.ordered_map import ordered_map
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, Kind, NoiseRecipe, SetIdentity
from sdxl_distill.shards.sidecar import parse_captions
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location
from sdxl_distill.verify.finding import FindingList
from sdxl_distill.verify.record_values import RecordPlace, wrong_values
from sdxl_distill.verify.set_check import check_recipe, read_identity
from sdxl_distill.verify.whole_set import Progress, Verification, show_nothing

_MAX_FINDINGS: Final = 50
_ACTION: Final = "unpack this record again from its shard, or build it again"
_IMAGE_TENSORS: Final = ("latents", "noise", "teacher_pred")
_EXACT: Final = {
    "resolution": ("I32", (2,)),
    "seed": ("I64", (1,)),
    "time_ids": ("I32", (6,)),
    "timestep": ("I64", (1,)),
}
_REQUIRED: Final[dict[Kind, tuple[str, ...]]] = {
    "latents": ("time_ids",),
    "text": (),
    "predictions": ("resolution", "seed", "timestep"),
}


class _LooseCheck(NamedTuple):
    """The result of the check of one file."""

    record: LooseRecord
    header: RecordHeader | None
    num_bytes: int
    errors: list[DistillError]


def verify_loose(
    path: str | Path | Location,
    *,
    recipe: NoiseRecipe | None = None,
    num_threads: int = 1,
    on_progress: Progress = show_nothing,
) -> Verification:
    """Verify a loose folder.

    Args:
        path: the folder.
        recipe: the recipe of noise and timesteps; None takes that of `set.json`, if there is one.
        num_threads: the number of files that are read at once.
        on_progress: a function that is called after each file.

    Raises:
        ConfigError: when there is no such folder.
        StorageError: when it cannot be listed.
    """
    location = Location(path)
    with location.open() as directory:
        names = directory.names()
        # What the folder says about itself.
        folder = LooseFolder.of(names)
        result = Verification(location.real().name)
        identity: SetIdentity | None = None
        if SET_IDENTITY_NAME in names:
            identity, result.findings = read_identity(SetFolder(directory))
        if identity is not None:
            result.findings += check_recipe(identity)
            recipe = recipe or identity.noise
        # Every file on its own.
        check = partial(_check_file, directory, folder, identity, recipe)
        findings = FindingList(result.set_id, limit=_MAX_FINDINGS)
        sets: Counter[str] = Counter()
        files = ordered_map(check, folder.records, num_threads, "verify")
        for num_done, file in enumerate(files, 1):
            for error in file.errors:
                findings.add(error, file.record.stem)
            if file.header is not None:
                sets[file.header.fingerprint] += 1
                result.kind = result.kind or _kind(file.header)
            result.num_bytes += file.num_bytes
            on_progress(num_done, len(folder.records))
    # All of them together.
    for error in (*_strangers(folder), *_not_together(sets, identity), *_not_once(folder)):
        findings.add(error)
    result.findings += findings.all()
    if result.kind == "predictions" and recipe is None:
        result.notes.append("seeds and timesteps were not computed again: no base seed is known")
    result.num_records = len(folder.records)
    result.num_draws = folder.num_draws
    return result


def _check_file(
    directory: Directory,
    folder: LooseFolder,
    identity: SetIdentity | None,
    recipe: NoiseRecipe | None,
    loose: LooseRecord,
) -> _LooseCheck:
    errors: list[DistillError] = []
    header: RecordHeader | None = None
    num_bytes = 0
    try:
        content = bytearray(directory.read(loose.file_name, MAX_RECORD_BYTES))
        num_bytes = len(content)
        header = RecordHeader.parse(bytes(content), loose.file_name)
        _require_form(header, num_bytes, loose, identity)
        place = RecordPlace(loose.image_id, loose.width, loose.height, loose.draw)
        errors += wrong_values(header.decode(content), place, recipe, _ACTION)
        if _kind(header) == "latents":
            is_there = loose.sidecar_name in folder.sidecars
            sidecar = directory.read(loose.sidecar_name, MAX_SIDECAR_BYTES) if is_there else b""
            parse_captions(sidecar, _ACTION)
    except FileNotFoundError:
        errors.append(CorruptError("was removed while it was verified", action=_ACTION))
    except DistillError as error:
        errors.append(error)
    return _LooseCheck(loose, header, num_bytes, errors)


def _require_form(
    header: RecordHeader, num_bytes: int, loose: LooseRecord, identity: SetIdentity | None
) -> None:
    if num_bytes != header.record_bytes:
        raise CorruptError(f"{num_bytes} bytes", expected=f"{header.record_bytes}", action=_ACTION)
    if identity is not None and header.fingerprint == identity.fingerprint:
        expected = RecordHeader.build(
            identity.schema, loose.width, loose.height, identity.fingerprint, header.source_sha256
        )
        if header.content != expected.content:
            raise CorruptError(
                "other tensors than the schema in set.json lists",
                expected=f"those of set {identity.id}",
                action=_ACTION,
            )
    forms = {place.name: (place.dtype, place.shape) for place in header.places}
    sides = loose.height // 8, loose.width // 8
    is_good = (
        forms.keys() >= set(_REQUIRED[_kind(header)])
        and all(name not in forms or forms[name] == form for name, form in _EXACT.items())
        and all(name not in forms or forms[name][1][1:] == sides for name in _IMAGE_TENSORS)
        and all(min(shape, default=1) > 0 for _, shape in forms.values())
    )
    if not is_good:
        found = ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in forms.items())
        raise CorruptError(
            f"tensors {found}",
            expected=f"those of docs/format.md for {loose.width}x{loose.height}",
            action=_ACTION,
        )


def _kind(header: RecordHeader) -> Kind:
    names = {place.name for place in header.places}
    if "teacher_pred" in names:
        return "predictions"
    return "latents" if "latents" in names else "text"


def _strangers(folder: LooseFolder) -> Iterable[DistillError]:
    for name in folder.strangers:
        yield ConfigError(
            f"the folder holds {name!r}, which is not a record",
            expected="{image_id}_{W}x{H}.safetensors, or …_d{k}.safetensors",
            action="move it elsewhere",
        )


def _not_together(sets: Counter[str], identity: SetIdentity | None) -> Iterable[DistillError]:
    expected = set(sets) if identity is None else {identity.fingerprint}
    if len(sets) > 1 or not expected.issuperset(sets):
        counts = ", ".join(f"{count} of set {key[:12]}…" for key, count in sets.most_common())
        yield IncompatibleError(
            f"records of another set or of several: {counts}",
            expected="records of one set, that of set.json if there is one",
            action="unpack each set into a folder of its own",
        )


def _not_once(folder: LooseFolder) -> Iterable[DistillError]:
    draws = Counter(record.draw for record in folder.records)
    if len({draws[draw] for draw in range(folder.num_draws)}) > 1:
        counts = ", ".join(f"{draws[draw]} of draw {draw}" for draw in range(folder.num_draws))
        yield IncompatibleError(
            f"the draws have different numbers of records: {counts}",
            expected="every record in every draw",
            action="unpack the set again",
        )
    ids = Counter(record.image_id for record in folder.records if record.draw == 0)
    for image_id, count in ids.items():
        if count > 1:
            yield IncompatibleError(
                f"image {image_id} is in {count} buckets",
                expected="every image once",
                action="keep the one that the latents set has",
            )
