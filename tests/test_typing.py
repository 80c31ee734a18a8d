"""Type checkers accept the public names and see through them: ``step`` keeps the type of what it runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "tests" / "typing" / "api.py"


def checked(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.torture
def test_mypy_strict_accepts_the_public_names() -> None:
    pytest.importorskip("mypy")
    done = checked([sys.executable, "-m", "mypy", "--strict", "--python-version", "3.11", str(API)])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.torture
def test_mypy_sees_what_is_wrong(tmp_path: Path) -> None:
    """The check above would also pass if everything were ``Any``."""
    pytest.importorskip("mypy")
    file = tmp_path / "wrong.py"
    file.write_text(
        "from agentflow import step, generate_content, Context, workflow\n"
        "async def charge(n: int) -> int: return n\n"
        "@workflow('w')\n"
        "async def flow(ctx: Context, n: int) -> int: return n\n"
        "async def main() -> None:\n"
        "    a: str = await step('s', charge, 1)\n"
        "    b: int = await generate_content('x')\n"
        "    c: str = await flow.run(1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.11", str(file)]
    done = checked(command)
    assert [line.split(":")[1] for line in done.stdout.splitlines() if "error" in line and str(file.name) in line] == [
        "6",
        "7",
        "8",
    ], done.stdout + done.stderr


def pyright() -> list[str]:
    """The command of a pyright that runs here: the pip package fetches node where there is none."""
    for name in ("pyright", "basedpyright"):
        found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        if found and checked([found, "--version"]).returncode == 0:
            return [found, "--pythonpath", sys.executable]
    pytest.skip("no pyright that runs here")


def test_pyright_accepts_the_public_names() -> None:
    command = pyright()
    done = checked([*command, str(API)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_says_that_it_is_typed() -> None:
    assert (ROOT / "agentflow" / "py.typed").is_file()
