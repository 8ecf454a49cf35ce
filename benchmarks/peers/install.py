"""Makes benchmarks/.peers: the peers in an environment of their own, on the project's torch.

Their dependencies are not followed: they ask for a CUDA build of torch and for versions of numpy
and transformers that the project cannot use. What they import is pinned in requirements.txt; torch,
numpy, webdataset and the rest come from the environment that runs this script.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".peers"
PYTHON = FOLDER / "bin/python"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
_INSTALLED = FOLDER / ".installed"


def install() -> None:
    """Make the environment where it is missing or of older requirements."""
    requirements = REQUIREMENTS.read_text("utf-8")
    if _INSTALLED.exists() and _INSTALLED.read_text("utf-8") == requirements:
        return
    venv.create(FOLDER, with_pip=True, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = FOLDER / "lib" / version / "site-packages"
    project = [sysconfig.get_path("purelib"), str(Path(__file__).parents[2])]
    (own / "project.pth").write_text("\n".join(project) + "\n", "utf-8")
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "-r", REQUIREMENTS]
    subprocess.run(command, check=True)
    _INSTALLED.write_text(requirements, "utf-8")


if __name__ == "__main__":
    install()
