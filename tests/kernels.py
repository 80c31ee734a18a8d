"""Real IPython kernels, as a notebook has them: cells are executed, and a kernel may be killed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import dataclass
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

    def __str__(self) -> str:
        return self.printed + self.said + self.error


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

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.client.stop_channels()
            self.manager.shutdown_kernel(now=True)

    def run(self, code: str) -> Output:
        """Execute a cell to its end."""
        output = Output()

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                which = "printed" if content["name"] == "stdout" else "said"
                setattr(output, which, getattr(output, which) + content["text"])
            elif message["msg_type"] == "error":
                output.error += "\n".join(content["traceback"])

        self.client.execute_interactive(code, timeout=SECONDS, output_hook=hear)
        return output

    def printed(self, code: str) -> str:
        """What a cell printed, or its traceback."""
        output = self.run(code)
        return output.printed + output.error

    def begin(self, code: str) -> None:
        """Start a cell and do not wait for its end."""
        self.client.execute(code)

    def kill(self) -> None:
        """The end of a kernel without a word, as by a crash or by the memory that ran out."""
        os.kill(self.manager.provisioner.pid, signal.SIGKILL)
        self.manager.provisioner.process.wait()
