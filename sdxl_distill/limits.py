"""Every bound on what is written and read back, each with its reason.

Planners, writers and readers take them from here, so that nothing is written that would be
refused on reading. A plan for 10⁹ records is legal: docs/running.md shows it.
"""

from __future__ import annotations

from typing import Final

MAX_SIDE_PX: Final = 8192
"""Longest side of a bucket: 64 times SDXL's area, and its latents still fit into a record."""
MAX_BUCKETS: Final = 4096
"""Buckets of one set: SDXL has 40; a configuration with this many is kept in 200 kB."""
MAX_DRAWS: Final = 1024
"""Draws of one image; predictions of this many take 130 MB for each image."""
MAX_TIMESTEPS: Final = 100_000
"""Steps of a noise schedule, whose tables are computed when a set is opened."""

MAX_TENSORS: Final = 32
"""Tensors of one record; an index has 8 bytes a record for each."""
MAX_RANK: Final = 4
"""Dimensions of one tensor of a record."""
MAX_LENGTH: Final = 1 << 20
"""Length of one dimension of a record's tensor."""
MAX_RECORD_BYTES: Final = 64 << 20
"""Size of one record, which is held in memory: 8192 × 8192 pixels in float32 take 26 MB."""
MAX_HEADER_BYTES: Final = 64 << 10
"""Size of a safetensors header of ours: 32 tensors take a tenth of it."""

MAX_CAPTION_BYTES: Final = 1 << 20
"""Size of one caption in UTF-8. Text encoders see 77 tokens; anything longer is another kind of
file next to the image."""
MAX_METADATA_BYTES: Final = 1 << 30
"""Size of one `metadata.jsonl`, which is read whole: a few million captions."""
MAX_SIDECAR_BYTES: Final = 8 << 20
"""Size of the JSON next to a record of latents: a caption of control characters grows sixfold in
it, and there is room for the names of the image's file and folder."""

MAX_RECORDS: Final = 65_536
"""Records of one shard, whose index is held in memory: at most 512 bytes a record."""
MAX_INDEX_BYTES: Final = MAX_RECORDS * 512 + 2 * MAX_HEADER_BYTES
"""Size of one index."""
MAX_SHARD_BYTES: Final = 2 << 30
"""Size of one tar: the unit of work and of retry, the body of one request to an object store."""

MAX_SHARDS: Final = 1_000_000
"""Shards of one set, all draws together: numbers have six digits, and every reader holds a row for
each shard. More records need larger shards, not more of them."""
MAX_SEGMENTS: Final = 1_000_000
"""Segments of one catalog: names have six digits."""
MAX_SEGMENT_BYTES: Final = 4 << 30
"""Size of one segment of a catalog, which is read whole: a larger scan is cut into several."""
MAX_SEGMENT_TEXT_BYTES: Final = 1 << 30
"""Size of the captions and names in one segment: half of what columns with 32-bit offsets hold."""
MANIFEST_BYTES_PER_SHARD: Final = 377
"""The most that one shard takes in a manifest: four digests, two ids, six numbers."""
MAX_SET_IDENTITY_BYTES: Final = 1 << 20
"""Size of `set.json`: a list of every bucket that a configuration can name fits in."""
MAX_MANIFEST_BYTES: Final = 512 << 20
"""Size of `manifest.json`: 10⁶ shards take 377 MB, which leaves room for three million keys of
images that did not decode."""
MAX_JSON_DEPTH: Final = 8
"""Nesting of containers in the JSON of a set: ours has four levels."""
MAX_COUNTER: Final = 1 << 53
"""Largest number in the JSON of a set: every reader of JSON holds it exactly."""

MAX_NAME_BYTES: Final = 255
"""Length of a file's or folder's name: NAME_MAX of Linux."""
MAX_PATH_BYTES: Final = 3584
"""Length of a path from a user: PATH_MAX of Linux is 4,096, and folders and files are added."""
MAX_CONFIG_BYTES: Final = 256 << 10
"""Size of a configuration, both as written and with all its defaults: a run keeps the latter in its
`config.json`, with a line for each number."""
MAX_VERSION_LENGTH: Final = 1000
"""Length of `cache.version`, which is part of every set record."""
MAX_CHECKPOINT_JSON_BYTES: Final = 16 << 20
"""Size of the JSON next to a checkpoint's tensors."""
MAX_STEPS: Final = 99_999_999
"""Steps of a run: names of checkpoints have eight digits."""
