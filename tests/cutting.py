"""A proxy on the loopback interface that breaks a connection at a chosen word, before or after the server has heard it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType


class CuttingProxy:
    """Passes everything on to a server, until ``cut`` is set.

    ``cut``: ``"request"`` breaks the connection when a client sends ``word``, which the server then never hears;
    ``"reply"`` lets the server hear it and do it, and breaks the connection before the answer has come;
    ``"late"`` breaks the connection to the client at once, and lets the server hear the word when ``go_on`` is set. It
    happens once; None passes everything.
    """

    def __init__(self, port: int, word: bytes) -> None:
        self.word = word
        self.cut: str | None = None
        self.cuts = 0
        self.go_on = threading.Event()
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._to))
            _Pair(self, client, server)


class _Pair:
    def __init__(self, proxy: CuttingProxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.heard = False  # what comes back now is kept from the client
        threading.Thread(target=self._up, daemon=True).start()
        threading.Thread(target=self._down, daemon=True).start()

    def _close(self) -> None:
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _up(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.client.recv(65536):
                cut = self.proxy.cut
                if cut is not None and self.proxy.word in data:
                    self.proxy.cut = None
                    self.proxy.cuts += 1
                    if cut == "request":
                        break
                    self.heard = True
                    if cut == "late":
                        self.client.shutdown(socket.SHUT_RDWR)
                        self.proxy.go_on.wait(60)
                self.server.sendall(data)
        if not self.heard:
            self._close()

    def _down(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.server.recv(65536):
                if self.heard:
                    if self.proxy.word in data:  # the tag of the command that is done
                        break
                    continue
                self.client.sendall(data)
        self._close()
