"""The voice of agentflow: the logger ``agentflow``, or stderr alone where a program does no logging.

``logging`` takes a short program more time than its steps do, so it is imported by programs that use it: from then on
everything goes through the logger, as if that had been so from the beginning.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging

SHOWN = "agentflow_shown"  # true in the ``extra`` of what stands on a card in a notebook: it is not printed as well


class _Log:
    """What ``logging.getLogger("agentflow")`` has of methods that are used here.

    Attributes: ``quiet`` (True prints nothing on stderr; the logger is spoken to all the same).
    """

    def __init__(self) -> None:
        self.quiet = False
        self._logger: logging.Logger | None = None
        self._lock = threading.Lock()
        if "logging" in sys.modules:
            import logging

            named = logging.getLogger("agentflow")
            if named.handlers:
                self._logger = named  # set up by the program
            else:
                self.logger()

    def logger(self) -> logging.Logger:
        """The logger; it prints to stderr while the program has set up no logging of its own."""
        if self._logger is None:
            import logging

            with self._lock:
                if self._logger is None:
                    named = logging.getLogger("agentflow")
                    printing = logging.Handler()
                    printing.emit = self._emit  # type: ignore[method-assign]
                    named.addHandler(printing)
                    if named.level == logging.NOTSET:
                        named.setLevel(logging.INFO)
                    self._logger = named
        return self._logger

    def _emit(self, record: logging.LogRecord) -> None:
        import logging

        if not logging.getLogger().handlers and not getattr(record, SHOWN, False):
            self._print(record.getMessage())

    def _print(self, text: str) -> None:
        if self.quiet:
            return
        from agentflow.redact import redact

        print(redact(text), file=sys.stderr)

    def _say(self, level: str, text: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if "logging" in sys.modules:
            getattr(self.logger(), level)(text, *args, stacklevel=3, **options)
        elif level != "debug" and not options.get("extra", {}).get(SHOWN):
            self._print(text % args if args else text)

    def debug(self, text: str, *args: Any, **options: Any) -> None:
        self._say("debug", text, args, options)

    def info(self, text: str, *args: Any, **options: Any) -> None:
        self._say("info", text, args, options)

    def warning(self, text: str, *args: Any, **options: Any) -> None:
        self._say("warning", text, args, options)

    def error(self, text: str, *args: Any, **options: Any) -> None:
        self._say("error", text, args, options)

    def exception(self, text: str, *args: Any, **options: Any) -> None:
        self._say("exception", text, args, options)


log = _Log()
