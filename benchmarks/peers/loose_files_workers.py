"""Loose files with two DataLoader worker processes."""

from __future__ import annotations

import loose_files
from peer import serve

if __name__ == "__main__":
    loose_files.NUM_WORKERS = 2
    serve(loose_files.prepare)
