"""A small project of its own in a temporary directory, tested by pytest in a process of its own, as users have it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

from tests.programs import ROOT


class Project:
    """Files, and ``pytest`` runs over them. The plugin is found by its entry point, as if agentflow were installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        # Without a name for the distribution pytest's list of plugins cannot be written.
        entry = folder / "site" / "agentflow_as_installed-1.dist-info"
        entry.mkdir(parents=True)
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
        lines = [f"{name} = {module}" for name, module in declared.items()]
        (entry / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]) + "\n")
        (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: agentflow-as-installed\nVersion: 1\n")
        self._path = os.pathsep.join([str(ROOT), str(entry.parent)])

    def write(self, name: str, text: str) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    def pytest(self, *args: str, env: dict[str, str] | None = None, python: tuple[str, ...] = ()) -> Result:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AGENTFLOW_", "OPENAI_", "ANTHROPIC_", "PYTEST_", "COV_"))
        }
        done = subprocess.run(
            [sys.executable, *python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", *args],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": self._path, "COLUMNS": "200", **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Result(done.returncode, done.stdout + done.stderr)


class Result:
    """How a run of pytest ended: ``code``, all it said, and how many tests passed, failed and had errors."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text
        last = [line for line in text.splitlines() if re.search(r" in [\d.]+s", line)]
        counts = dict((word.rstrip("s"), int(number)) for number, word in re.findall(r"(\d+) (passed|failed|errors?)", last[-1] if last else ""))
        self.passed, self.failed, self.errors = (counts.get(word, 0) for word in ("passed", "failed", "error"))

    def __repr__(self) -> str:
        return self.text
