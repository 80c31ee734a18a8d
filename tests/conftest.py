"""Every test has a journal of its own, no model, no quiet left-overs of the test before."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import ledger, scratch
from agentflow.journal import Journal
from agentflow.providers import registry
from agentflow.settings import settings
from tests import programs
from tests.loopback import Loopback

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
def journal_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of this test's journal."""
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "journal"
    prices = dict(ledger._PRICES)
    entries = dict(registry._entries)
    monkeypatch.setenv("AGENTFLOW_PATH", str(path))
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
