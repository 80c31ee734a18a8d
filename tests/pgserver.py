"""A PostgreSQL server of one's own: installed when it is missing, in a directory of its own, stopped by its process id."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.debian import installed

PASSWORD = "s3cret-of-flow"


def binaries() -> Path:
    """Where initdb and pg_ctl are."""
    return installed("postgresql", _found)


def _found() -> Path | None:
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: int(file.parts[-3]))
    if places:
        return places[-1].parent
    named = shutil.which("initdb")
    return Path(os.path.realpath(named)).parent if named else None


class Server:
    """One cluster. ``url(schema)`` names a journal in it; ``socket_url`` needs no password."""

    def __init__(self, *settings: str) -> None:
        self.bin = binaries()
        memory = Path("/dev/shm")  # a sync costs nothing there, and is asked for all the same
        roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
        self.home = Path(tempfile.mkdtemp(prefix="agentflow-pg-", dir=memory if roomy else None))
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:  # the server refuses to run as root
            names = {entry.pw_name for entry in pwd.getpwall()}
            who = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(self.home, who.pw_uid, who.pw_gid)
            self._user = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
        self.data = self.home / "data"
        word = self.home / "word"
        word.write_text(PASSWORD)
        word.chmod(0o644)
        self._run(
            "initdb", "-D", self.data, "-U", "flow", "-E", "UTF8", "--locale=C", "--locale-provider=icu",
            "--icu-locale=en-US", "--auth-local=trust",
            "--auth-host=scram-sha-256", f"--pwfile={word}", "--no-sync",
        )  # fmt: skip
        lines = [
            "listen_addresses = '127.0.0.1'", f"unix_socket_directories = '{self.home}'",
            "shared_buffers = 32MB", "max_connections = 60", "min_wal_size = 32MB", "max_wal_size = 128MB",
            "deadlock_timeout = 100ms", *settings,
        ]  # fmt: skip
        with (self.data / "postgresql.conf").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")
        for attempt in range(5):  # somebody else may take the port that was free a moment ago
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
            with (self.data / "postgresql.conf").open("a") as file:
                file.write(f"port = {self.port}\n")
            try:
                self.start()
                return
            except AssertionError:
                if attempt == 4 or "could not create any TCP/IP sockets" not in (self.home / "log").read_text():
                    raise

    def _run(self, name: str, *words: object) -> None:
        done = subprocess.run(
            [self.bin / name, *map(str, words)], cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            **self._user,
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"

    def start(self) -> None:
        self._run("pg_ctl", "-D", self.data, "-l", self.home / "log", "-w", "-t", "60", "-s", "start")

    def crash(self) -> None:
        """Ends it as a power cut of the server would, but for its disk."""
        self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "-t", "60", "-s", "stop")

    def stop(self) -> None:
        file = self.data / "postmaster.pid"
        if not file.exists():
            return
        pid = int(file.read_text().split()[0])
        os.kill(pid, signal.SIGINT)
        deadline = time.monotonic() + 60
        while file.exists():
            assert time.monotonic() < deadline, "the server does not stop"
            time.sleep(0.01)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def url(self, schema: str = "", *, database: str = "postgres", password: str = PASSWORD, user: str = "flow") -> str:
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@127.0.0.1:{self.port}/{database}" + (f"?schema={schema}" if schema else "")

    def socket_url(self, schema: str) -> str:
        return f"postgresql://flow@/postgres?host={self.home}&port={self.port}&schema={schema}"

    def ask(self, query: str, *args: object, database: str = "postgres") -> list[tuple[Any, ...]]:
        """A statement by the superuser, through the socket."""
        import psycopg

        with psycopg.connect(host=str(self.home), port=self.port, user="flow", dbname=database, autocommit=True) as con:
            cursor = con.execute(query, args or None)
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """A connection of the superuser, for what has to be held open."""
        import psycopg

        with psycopg.connect(host=str(self.home), port=self.port, user="flow", dbname="postgres", autocommit=True) as con:
            yield con
