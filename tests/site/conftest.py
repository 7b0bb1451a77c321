"""One build of the site, for all tests that look at it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path) -> None:
    """The strict build; what it says goes into a file, which is there when it is done."""
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-c", "docs"]
    done = subprocess.run(
        [*command, "-d", folder / "doctrees", ".", folder / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr + ("" if done.returncode == 0 else "The build failed.")
    (folder / "said.part").write_text(said, encoding="utf-8")
    (folder / "said.part").rename(folder / "said")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The folder of one build for all tests, and for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker builds it
        end = time.monotonic() + 600
        while not (folder / "said").exists() and time.monotonic() < end:
            time.sleep(0.5)
    else:
        build(folder)
    return folder
