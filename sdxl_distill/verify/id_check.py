"""Verifies all ids of a set together: no image twice, and none that is listed as undecodable."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.safetensors_layout import byte_view
from sdxl_distill.shards.set_identity import REBUILDING, SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.verify.finding import Finding, FindingList


class IdCheck:
    """Collects the ids of a set's shards one after the other, in 8 bytes a record.

    Ids have 16 bytes; their halves folded into one tell any two images apart, except for one pair
    in 2⁶⁴. The indices are read again only when two are alike.

    Args:
        identity: the identity of the set.
        undecodable: the keys that no shard may hold.
    """

    def __init__(self, identity: SetIdentity, undecodable: Iterable[str]) -> None:
        self._identity = identity
        self._undecodable = frozenset(undecodable)
        self._folded = array("Q")
        self._names: list[ShardName] = []
        self._held: set[str] = set()

    def add(self, index: ShardIndex) -> None:
        """Remember the ids of a shard; those of draw 0, since the others hold the same."""
        if self._undecodable:
            self._held |= self._undecodable.intersection(index.keys())
        if index.name.draw == 0 and index.num_records:
            self._names.append(index.name)
            self._folded.frombytes(byte_view(_folded(index)))

    def findings(self, read: Callable[[ShardName], ShardIndex | None]) -> list[Finding]:
        """Return what is wrong with the ids of all shards together.

        Args:
            read: a function that returns a shard's index again; None when it cannot be read.
        """
        findings = FindingList(self._identity.id)
        for image_id in self._twice(read):
            findings.add(
                CorruptError(
                    f"image {image_id} is in more than one shard",
                    expected="every image once",
                    action=REBUILDING[self._identity.kind],
                )
            )
        for key in sorted(self._held):
            findings.add(
                CorruptError(
                    "a record of an image that the manifest says did not decode",
                    action=REBUILDING[self._identity.kind],
                ),
                key,
            )
        return findings.all()

    def _twice(self, read: Callable[[ShardName], ShardIndex | None]) -> list[str]:
        folded = np.frombuffer(self._folded, np.uint64)
        folded.sort()  # in place: a copy would be as large as all that was collected
        alike = np.unique(folded[1:][folded[1:] == folded[:-1]])
        if not alike.size:
            return []
        counts: Counter[str] = Counter()
        for index in filter(None, map(read, self._names)):
            records = np.flatnonzero(np.isin(_folded(index), alike))
            counts.update(index.image_id(int(record)) for record in records)
        return sorted(image_id for image_id, count in counts.items() if count > 1)


def _folded(index: ShardIndex) -> npt.NDArray[np.uint64]:
    halves = np.frombuffer(index.ids.tobytes(), np.uint64)
    return halves[::2] ^ halves[1::2]
