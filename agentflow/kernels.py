"""The IPython kernel that this process is, if it is one."""

from __future__ import annotations

import os
import sys
from typing import Any

_watched: Any = None  # the shell whose cells are followed
_busy = False


def kernel() -> Any:
    """The shell of the IPython kernel that this process is; None in all other programs, terminals of IPython too."""
    if "ipykernel" not in sys.modules:
        return None
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    session = getattr(getattr(shell, "kernel", None), "session", None)
    # A child process that was forked from a kernel has its shell, and nobody who listens.
    return shell if session is not None and getattr(session, "pid", os.getpid()) == os.getpid() else None


def cell(shell: Any) -> dict[str, Any]:
    """The header of the message that asked for the cell whose code is running; it answers what is displayed."""
    return dict(shell.get_parent().get("header", {}))


def acknowledging(widget: Any) -> Any:
    """A widget whose messages are answered also while a cell awaits something.

    The protocol has a kernel say ``idle`` when it has dealt with a message (Jupyter messaging, "Kernel status"), and
    widgets in a frontend send what is typed next after that alone. ipykernel 7 deals with their messages while a cell
    awaits something and does not say so: the second change of a field would be held back, and an old answer be sent.
    """
    shell = kernel()
    if shell is not None:
        _follow(shell)
        asked, handle = cell(shell), widget._handle_msg

        def heard(message: dict[str, Any]) -> None:
            handle(message)
            if _busy:
                _say(shell, "idle", message)
                _say(shell, "busy", asked)

        widget.comm.on_msg(heard)
    return widget


def _say(shell: Any, state: str, parent: dict[str, Any]) -> None:
    of = shell.kernel
    topic = f"kernel.{of.ident}.status".encode()
    of.session.send(of.iopub_socket, "status", {"execution_state": state}, parent=parent, ident=topic)


def _follow(shell: Any) -> None:
    """Know from now on, while this cell is running, whether one is."""
    global _watched, _busy
    if _watched is not shell:
        _watched, _busy = shell, True
        shell.events.register("pre_run_cell", lambda info: _set_busy(True))
        shell.events.register("post_run_cell", lambda result: _set_busy(False))


def _set_busy(now: bool) -> None:
    global _busy
    _busy = now
