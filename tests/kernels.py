"""Real IPython kernels, as a notebook has them: cells are executed, and a kernel may be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.programs import environment

SECONDS = 120  # a guard for one cell on a slow machine: no cell is to block


@dataclass
class Output:
    """What a cell showed: what it printed, what was said on stderr, what it ended with."""

    printed: str = ""
    said: str = ""
    error: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.printed + self.said + self.shown + self.error

    @property
    def displays(self) -> list[dict[str, Any]]:
        """What the cell shows at its end, by MIME types: displays as they were updated last, and its result."""
        found: dict[str, dict[str, Any]] = {}
        for number, message in enumerate(self.messages):
            ident = message["content"].get("transient", {}).get("display_id", str(number))
            assert (message["msg_type"] == "update_display_data") == (ident in found), "updated before it is there"
            found[ident] = message["content"]["data"]
        return list(found.values())

    @property
    def shown(self) -> str:
        """What it shows, in words."""
        return "".join(each.get("text/plain", "") + "\n" for each in self.displays)

    @property
    def html(self) -> str:
        """What it shows, as HTML."""
        return "".join(each.get("text/html", "") + "\n" for each in self.displays)


class Kernel:
    """A kernel in a folder, with a journal there."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        import jupyter_client

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.manager = jupyter_client.KernelManager(kernel_name="python3")
            self.manager.kernel_spec.argv[0] = sys.executable
            made = {**environment(folder), "IPYTHONDIR": str(folder / "ipython"), **(env or {})}
            self.manager.start_kernel(cwd=str(folder), env=made)
            self.client = self.manager.blocking_client()
            self.client.start_channels()
            self.client.wait_for_ready(timeout=SECONDS)

        self.widgets: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.client.stop_channels()
            self.manager.shutdown_kernel(now=True)

    def run(self, code: str, on_message: Callable[[dict[str, Any]], None] | None = None) -> Output:
        """Execute a cell to its end. ``on_message`` hears of each message when it comes."""
        output = Output()

        def hear(message: dict[str, Any]) -> None:
            self._widget(message)
            if on_message is not None:
                on_message(message)
            content = message["content"]
            if message["msg_type"] == "stream":
                which = "printed" if content["name"] == "stdout" else "said"
                setattr(output, which, getattr(output, which) + content["text"])
            elif message["msg_type"] in ("display_data", "update_display_data", "execute_result"):
                output.messages.append(message)
            elif message["msg_type"] == "error":
                output.error += "\n".join(content["traceback"])

        self.client.execute_interactive(code, timeout=SECONDS, output_hook=hear)
        return output

    def _widget(self, message: dict[str, Any]) -> None:
        """Keep the state of widgets as a frontend does."""
        content = message["content"]
        if message["msg_type"] == "comm_open" and content["target_name"] == "jupyter.widget":
            self.widgets[content["comm_id"]] = dict(content["data"]["state"])
        elif message["msg_type"] == "comm_msg" and content["data"].get("method") == "update":
            self.widgets.setdefault(content["comm_id"], {}).update(content["data"]["state"])

    def find(self, model: str, **state: Any) -> str:
        """The newest widget of a model with such a state."""
        found = [
            ident
            for ident, has in self.widgets.items()
            if has.get("_model_name") == model and all(has.get(name) == value for name, value in state.items())
        ]
        assert found, f"no {model} with {state} among {[each.get('_model_name') for each in self.widgets.values()]}"
        return found[-1]

    def click(self, description: str) -> None:
        """Press a button, and wait until the kernel has dealt with it."""
        self._settle(self.press(description))

    def press(self, description: str) -> str:
        """Press a button; the id of the message."""
        return self._to_widget(self.find("ButtonModel", description=description), {"method": "custom", "content": {"event": "click"}})

    def fill(self, ident: str, value: Any) -> None:
        """Type, tick or choose something."""
        name = "index" if self.widgets[ident]["_model_name"] == "DropdownModel" else "value"
        self._settle(self._to_widget(ident, {"method": "update", "state": {name: value}, "buffer_paths": []}))

    def refresh(self) -> None:
        """Ask for the state of all widgets: what came while a cell was executed is not kept."""
        for ident in self.widgets:
            self._settle(self._to_widget(ident, {"method": "request_state"}))

    def _to_widget(self, ident: str, data: dict[str, Any]) -> str:
        message = self.client.session.msg("comm_msg", {"comm_id": ident, "data": data})
        self.client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def _messages(self) -> Iterator[dict[str, Any]]:
        """What the kernel publishes; an error when it is still not what was waited for after a long time."""
        deadline = time.monotonic() + SECONDS
        while True:
            message = self.client.get_iopub_msg(timeout=SECONDS)
            self._widget(message)
            yield message
            assert time.monotonic() < deadline, "the kernel does not say what is waited for"

    def _settle(self, ident: str) -> None:
        for message in self._messages():
            mine = message["parent_header"].get("msg_id") == ident
            if mine and message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return

    def printed(self, code: str) -> str:
        """What a cell printed, or its traceback."""
        output = self.run(code)
        return output.printed + output.error

    def begin(self, code: str) -> str:
        """Start a cell and do not wait for its end; the id of the message, for ``end``."""
        return str(self.client.execute(code))

    def end(self, ident: str) -> str:
        """Wait for the end of a cell; what it printed or failed with from now on."""
        found = ""
        for message in self._messages():
            content = message["content"]
            if message["parent_header"].get("msg_id") == ident:
                found += content.get("text", "") + "\n".join(content.get("traceback", ()))
                if content.get("execution_state") == "idle":
                    break
        return found

    def wait_for(self, model: str, **state: Any) -> str:
        """A widget, as soon as there is one, while a cell is running."""
        for _ in self._messages():
            if any(each.get("_model_name") == model and state.items() <= each.items() for each in self.widgets.values()):
                break
        return self.find(model, **state)

    def kill(self) -> None:
        """The end of a kernel without a word, as by a crash or by the memory that ran out."""
        os.kill(self.manager.provisioner.pid, signal.SIGKILL)
        self.manager.provisioner.process.wait()
