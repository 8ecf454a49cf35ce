"""Images and captions of a folder, and the table that gives each its bucket, crop and shard."""
