from __future__ import annotations

import pytest

from sdxl_distill.demo.photos import PhotoFolders, write_photos


@pytest.fixture(scope="session")
def photo_folders(tmp_path_factory: pytest.TempPathFactory) -> PhotoFolders:
    """The demo's photos; read only."""
    return write_photos(tmp_path_factory.mktemp("photos"))
