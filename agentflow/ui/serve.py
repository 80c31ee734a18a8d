"""Binds, says where, and serves until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from agentflow.errors import UsageError
from agentflow.journal import Place
from agentflow.ui.guard import Guard, is_loopback
from agentflow.ui.routes import Routes

PORT = 8765
_PORTS = 50  # so many are tried from the first on


class Server:
    """The page over one journal, bound but not served yet.

    Args:
        place: the journal's directory, or the URL of its database.
        host: the address to bind to.
        port: None takes 8765 or the next one that is free; 0 any.

    Attributes:
        url: the address with this start's token; ``port``; ``is_local``: whether only this machine can reach it.

    Raises:
        UsageError: the address cannot be bound to.
    """

    def __init__(self, place: Place, host: str, port: int | None) -> None:
        self.token = secrets.token_urlsafe(32)
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        address = self._socket.getsockname()[0]
        self.is_local = is_loopback(address)
        name = socket.gethostname().lower() if address in ("0.0.0.0", "::") else host.lower()
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{self.port}/?token={self.token}"
        names = {host.lower()} if self.is_local else {host.lower(), name, socket.getfqdn().lower()}
        app = Guard(
            Routes(place, lambda: self._server.should_exit).app(),
            token=self.token,
            names=frozenset(names),
            anywhere=not self.is_local,
            cookie=f"agentflow-ui-{self.port}",  # cookies are not told apart by port
        )
        # No access log: it would hold the token.
        self._server = _Uvicorn(
            uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none")
        )
        self._server.config.timeout_graceful_shutdown = 3

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGINT or SIGTERM; ``ready`` is called as soon as these end it as they should."""

        async def main() -> None:
            loop = asyncio.get_running_loop()
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(each, self._stop)
            ready()
            await self._server.serve([self._socket])

        asyncio.run(main())

    def _stop(self) -> None:
        self._server.force_exit = self._server.should_exit  # a second time: at once
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled by ``Server.run``: uvicorn would raise them again at the end, as if something failed."""
        yield


def _bound(host: str, port: int | None) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host {host}: there is no such address ({error.strerror}).") from error
    numbers = range(PORT, PORT + _PORTS) if port is None else (port,)
    for number in numbers:
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((address[0], number, *address[2:]))
            made.listen(64)
            return made
        except OSError as error:
            made.close()
            why = error.strerror
    told = f"port {port}" if port is not None else f"ports {PORT} to {PORT + _PORTS - 1}"
    raise UsageError(f"{told} of {host} cannot be had ({why}). Another one: --port 9000, or --port 0 for any.")


def has_browser() -> bool:
    """Whether there is a screen for one: in a terminal without, one for text would take the terminal over."""
    return sys.platform == "darwin" or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


@contextlib.contextmanager
def browser(url: str, place: Place) -> Iterator[Callable[[], None]]:
    """What opens the page in the person's browser, by way of a file: other users see a process's arguments.

    The file is beside the journal, or in a temporary directory where that is in a database, and readable by its owner
    alone; it is gone when the context is left.
    """
    made_for_it = None if isinstance(place, Path) else tempfile.mkdtemp(prefix="agentflow-ui-")
    file = (place if isinstance(place, Path) else Path(str(made_for_it))) / f"new-ui-{os.getpid()}.html"

    def open_() -> None:
        threading.Thread(target=to_browser, daemon=True).start()  # it may take as long as the browser does

    def to_browser() -> None:
        text = f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(url)}"><title>agentflow</title>'
        with open(file, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as made:
            made.write(text)
        webbrowser.open(file.as_uri())

    try:
        yield open_
    finally:
        file.unlink(missing_ok=True)
        if made_for_it is not None:
            os.rmdir(made_for_it)
