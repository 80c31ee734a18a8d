"""Programs that tests need and that come with Debian: installed where they are missing, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path


def installed(package: str, find: Callable[[], Path | None]) -> Path:
    """Where a program is, by ``find``; where that finds none, after ``package`` has been installed (which takes root)."""
    found = find()
    if found is not None:
        return found
    with open(Path(tempfile.gettempdir()) / "agentflow-tests-apt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = find()
        if found is None:
            assert shutil.which("apt-get"), f"a test needs {package}, and there is no apt-get to install it"
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for command in (["update"], ["install", "-y", "--no-install-recommends", package]):
                subprocess.run(["apt-get", "-qq", *command], check=True, env=env, stdout=subprocess.DEVNULL)
            found = find()
    assert found is not None, f"apt-get install {package} has not brought what a test needs of it"
    return found
