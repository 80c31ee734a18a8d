"""Every test has a journal of its own, no model, no quiet left-overs of the test before."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import journal as journals
from agentflow import ledger, scratch
from agentflow.journal import Journal, PostgresURL, place
from agentflow.providers import registry
from agentflow.settings import settings
from tests import programs
from tests.loopback import Loopback
from tests.pgserver import Server

# A suite that is started in the background ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ENVIRONMENT = (
    "AGENTFLOW_ASK",
    "AGENTFLOW_MODEL",
    "AGENTFLOW_LEASE_SECONDS",
    "AGENTFLOW_PAID_RETRY_SECONDS",
    "AGENTFLOW_PROGRESS",
    "AGENTFLOW_POLL_SECONDS",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
)


@pytest.fixture(autouse=True)
def journal_path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of this test's journal.

    ``AGENTFLOW_TESTS_IN=postgres pytest tests/test_x.py`` has it in PostgreSQL instead, which any test will do that does
    not look at files.
    """
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "journal"
    prices = dict(ledger._PRICES)
    entries = dict(registry._entries)
    monkeypatch.setenv("AGENTFLOW_PATH", str(path))
    if os.environ.get("AGENTFLOW_TESTS_IN") == "postgres":
        monkeypatch.setenv("AGENTFLOW_PATH", _postgres_place(request.getfixturevalue("postgres_server")))
    yield path
    while programs.running:
        process = programs.running.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()
    agentflow.configure(path=None, model=None, notify=None, authorize=None, redact=None, budget=None, limits=None, quiet=False, ask=None, progress=None, tracing=None, trace_content=None, trace_replayed=None)
    settings.clock = None
    ledger._PRICES.clear()
    ledger._PRICES.update(prices)
    scratch._scopes.clear()
    registry._entries.clear()
    registry._entries.update(entries)
    _close_databases()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL server of this process of the suite."""
    server = Server()
    yield server
    server.close()


class Kept:
    """A journal of one of the kinds: where it is, and how somebody else can keep everybody from writing to it."""

    def __init__(self, where: str, server: Server | None) -> None:
        self.where = where
        self.server = server
        self.journal = Journal.open(where)

    def reopen(self) -> Journal:
        self.journal.close()
        self.journal = Journal.open(self.where)
        return self.journal

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        if self.server is None:
            con = sqlite3.connect(Path(self.where) / "cache.db", isolation_level=None, check_same_thread=False)
            con.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                con.execute("ROLLBACK")
                con.close()
        else:
            with self.server.session() as session:
                session.execute("SELECT pg_advisory_lock(%s)", (int(self.journal.id[:15], 16),))
                yield

    def rows(self) -> dict[str, str]:
        """What is durable, read past the journal."""
        if self.server is not None:
            return dict(self.server.ask(f"SELECT key, value FROM {place(self.where).schema}.records"))
        with contextlib.closing(sqlite3.connect(Path(self.where) / "cache.db")) as con:
            return dict(con.execute("SELECT key, value FROM Cache").fetchall())


def _postgres_place(server: Server) -> str:
    """A schema of its own, through the socket, where no password is asked for: as text it is all there."""
    return server.socket_url(f"t_{os.urandom(6).hex()}")


def _close_databases() -> None:
    scratch._scopes.clear()
    for opened in list(journals._journals.values()):
        if isinstance(opened.path, PostgresURL):
            opened.close()


@pytest.fixture(params=["files", "postgres"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    """A journal of each kind."""
    server = request.getfixturevalue("postgres_server") if request.param == "postgres" else None
    made = Kept(str(tmp_path / "j") if server is None else _postgres_place(server), server)
    yield made
    made.journal.close()
    _close_databases()


@pytest.fixture
def database(postgres_server: Server, journal_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The journal of this test, and of the programs it starts, is in PostgreSQL; its URL."""
    url = _postgres_place(postgres_server)
    monkeypatch.setenv("AGENTFLOW_PATH", url)
    yield url
    _close_databases()


@pytest.fixture
def again() -> Callable[[], None]:
    """Forget what this process knows, so that the next run reads everything from the files."""

    def forget() -> None:
        scratch._scopes.clear()

    return forget


@pytest.fixture
def journal(journal_path: Path) -> Journal:
    return scratch.open_journal()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Everything agentflow has said so far, one line each."""
    caplog.set_level(logging.INFO, logger="agentflow")
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name == "agentflow")


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loopback]]:
    """Starts a scripted server that counts what arrives and sends the SDKs to it."""
    started: list[Loopback] = []

    def start(*script: Any, turns: list[Any] | None = None) -> Loopback:
        server = Loopback(script=list(script), turns=turns)
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        started.append(server.__enter__())
        return server

    yield start
    for server in started:
        server.__exit__(None, None, None)
