"""Every bound on what is written and read back, each with its reason.

Planners, writers and readers take them from here, so that nothing is written which is refused
when it is read. Ten to the ninth records have a legal plan: docs/running.md says which.
"""

from __future__ import annotations

from typing import Final

MAX_SIDE_PX: Final = 8192
"""Of a bucket: 64 times SDXL's area, and the latents of one image still fit into a record."""
MAX_BUCKETS: Final = 4096
"""Of one set: SDXL has 40; a configuration of so many is kept in 200 kB."""
MAX_DRAWS: Final = 1024
"""Of one image. Predictions of so many draws take 130 MB for each image."""
MAX_TIMESTEPS: Final = 100_000
"""Of a noise schedule: tables of so many steps are computed when a set is opened."""

MAX_TENSORS: Final = 32
"""Of one record; an index has 8 bytes a record for each."""
MAX_RANK: Final = 4
"""Of one tensor of a record."""
MAX_LENGTH: Final = 1 << 20
"""Of one dimension of a record's tensor."""
MAX_RECORD_BYTES: Final = 64 << 20
"""Of one record, which is held in memory: 8192 × 8192 pixels in float32 take 26 MB."""
MAX_HEADER_BYTES: Final = 64 << 10
"""Of a safetensors header of ours: 32 tensors take a tenth of it."""

MAX_CAPTION_BYTES: Final = 1 << 20
"""Of one caption in UTF-8. Text encoders see 77 tokens; more than this is another kind
of file next to the image."""
MAX_METADATA_BYTES: Final = 1 << 30
"""Of one `metadata.jsonl`, which is read whole: some million captions."""
MAX_SIDECAR_BYTES: Final = 8 << 20
"""Of the JSON beside a record of latents: a caption of control characters grows sixfold in it, and
the names of its file and folder have room besides."""

MAX_RECORDS: Final = 65_536
"""Of one shard: its index is held in memory, 512 bytes a record at most."""
MAX_INDEX_BYTES: Final = MAX_RECORDS * 512 + 2 * MAX_HEADER_BYTES
"""Of one index."""
MAX_SHARD_BYTES: Final = 2 << 30
"""Of one tar: the unit of work and of retry, and the body of one request to an object store."""

MAX_SHARDS: Final = 1_000_000
"""Of one set, all draws together: numbers have six digits, and every reader holds a row of each
shard. Larger shards, not more of them, are the way to more records."""
MAX_SEGMENTS: Final = 1_000_000
"""Of one catalog: names have six digits."""
MAX_SEGMENT_BYTES: Final = 4 << 30
"""Of one segment of a catalog, which is read whole: a scan that finds more is cut into several."""
MAX_SEGMENT_TEXT_BYTES: Final = 1 << 30
"""Of the captions and names in one segment: half of what columns with offsets of 32 bits hold."""
MANIFEST_BYTES_PER_SHARD: Final = 377
"""What a shard takes in a manifest at most: four digests, two ids, six numbers."""
MAX_SET_IDENTITY_BYTES: Final = 1 << 20
"""Of `set.json`: a list of every bucket that a configuration can name fits in."""
MAX_MANIFEST_BYTES: Final = 512 << 20
"""Of `manifest.json`: 10⁶ shards take 377 MB, which leaves room for three million keys of images
that did not decode."""
MAX_JSON_DEPTH: Final = 8
"""Of containers in the JSON of a set: ours has four."""
MAX_COUNTER: Final = 1 << 53
"""Of numbers in the JSON of a set: what every reader of JSON holds exactly."""

MAX_NAME_BYTES: Final = 255
"""Of a file's or folder's name: NAME_MAX of Linux."""
MAX_PATH_BYTES: Final = 3584
"""Of a path that is given: PATH_MAX of Linux is 4,096, and folders and files are added to it."""
MAX_CONFIG_BYTES: Final = 256 << 10
"""Of a configuration, as it is written and with all its defaults: a run keeps that in its
`config.json`, with a line for each number."""
MAX_VERSION_LENGTH: Final = 1000
"""Of `cache.version`, which is part of every set record."""
MAX_CHECKPOINT_JSON_BYTES: Final = 16 << 20
"""Of the JSON beside a checkpoint's tensors."""
MAX_STEPS: Final = 99_999_999
"""Of a run: names of checkpoints have eight digits."""
