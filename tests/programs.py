"""Programs in processes of their own, which may kill themselves half-way."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentflow.pgurl import PostgresURL

ROOT = Path(__file__).resolve().parent.parent

PRELUDE = '''
import asyncio, os, signal, sys
from pathlib import Path
from agentflow import *

HERE = Path(__file__).resolve().parent

def note(word):
    """One execution, counted in a file that survives any death of the process."""
    fd = os.open(HERE / "notes.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (str(word) + "\\n").encode())
    os.close(fd)

def die():
    os.kill(os.getpid(), signal.SIGKILL)
'''


@dataclass
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def write_program(source: str, folder: Path, name: str = "program.py") -> Path:
    """A program file with the prelude: ``note(word)``, ``die()`` and all names of agentflow."""
    file = folder / name
    text = PRELUDE + textwrap.dedent(source)
    # Not written again for a second process: the first one may be reading it at this moment.
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


def run_program(
    source: str | Path,
    folder: Path,
    *args: str,
    env: dict[str, str] | None = None,
    expect_kill: bool = False,
    expect_failure: bool = False,
    timeout: float = 60,
    name: str = "program.py",
) -> Ended:
    """Run a program to its end; by default anything but success fails the test and shows what it said."""
    file = source if isinstance(source, Path) else write_program(source, folder, name)
    done = subprocess.run(
        [sys.executable, str(file), *args],
        cwd=folder,
        env=environment(folder, env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    ended = Ended(done.returncode, done.stdout, done.stderr)
    if expect_kill:
        assert ended.killed, f"was to be killed, ended with {ended.code}\n{ended.out}\n{ended.err}"
    elif not expect_failure:
        assert ended.code == 0, f"ended with {ended.code}\n{ended.out}\n{ended.err}"
    return ended


# Programs that were started and not waited for here; whatever a test leaves running is killed after it.
running: list[subprocess.Popen[str]] = []


def start_program(source: str | Path, folder: Path, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a program and return at once."""
    file = source if isinstance(source, Path) else write_program(source, folder)
    process = subprocess.Popen(
        [sys.executable, str(file), *args],
        cwd=folder,
        env=environment(folder, env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running.append(process)
    return process


def environment(folder: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    base = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "ANTHROPIC_"))}
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    there = os.environ.get("AGENTFLOW_PATH", "")  # a database is the same for all; a directory is that of the folder
    there = there if there.startswith("postgresql://") else str(folder / "journal")
    return {**base, "AGENTFLOW_PATH": there, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})}


def notes(folder: Path) -> list[str]:
    """The words noted so far by all processes, in order."""
    file = folder / "notes.txt"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def stop_between_commits(where: Path | PostgresURL, pid: int) -> None:
    """Stops a child of this process, as SIGSTOP does, at a moment when it does not hold the journal's write lock.

    Stopped inside a transaction it would keep everybody from committing, which is another question.
    """
    with _can_commit(where, pid) as can_commit:
        while True:
            os.kill(pid, signal.SIGSTOP)
            # kill() returns before every thread has stopped: until then one of them can still take the lock.
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if can_commit():
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.001)


@contextmanager
def _can_commit(where: Path | PostgresURL, pid: int) -> Iterator[Callable[[], bool]]:
    """Tells whether nobody is at a commit, so that the process that was stopped is not either."""
    if isinstance(where, PostgresURL):
        import psycopg

        with psycopg.connect(where.conninfo, autocommit=True) as con:
            ((store,),) = con.execute(f"SELECT value FROM {where.schema}.about WHERE key = 'store'").fetchall()

            def nobody_has_it() -> bool:
                at_work = "SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND state <> 'idle'"
                if con.execute(at_work, (f"agentflow {pid}",)).fetchall():
                    return False
                ((mine,),) = con.execute("SELECT pg_try_advisory_lock(%s)", (int(store[:15], 16),)).fetchall()
                if mine:
                    con.execute("SELECT pg_advisory_unlock_all()")
                return bool(mine)

            yield nobody_has_it
        return
    with closing(sqlite3.connect(where / "cache.db", timeout=0.05, isolation_level=None)) as files:

        def lock_is_free() -> bool:
            try:
                files.execute("BEGIN IMMEDIATE")
                files.execute("ROLLBACK")
            except sqlite3.OperationalError:
                return False
            return True

        yield lock_is_free
