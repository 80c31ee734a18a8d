"""Side files of runs: lines that survive the process, not a power loss, at 1-2 µs each."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from agentflow.errors import UsageError

_OPEN_FILES = 64


class Marks:
    """One append-only file per run, each line with its length in front so that a torn one can be told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def forked(self) -> None:
        """Begin anew in a child process."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def append(self, run_id: str, line: str) -> None:
        """Append a line to the run's side file: survives the process, not a power loss; not synced."""
        if "\n" in line:
            raise UsageError("A mark is one line: it cannot contain a line break.")
        data = line.encode()
        data = b"%x:%b\n" % (len(data), data)
        with self._lock:
            descriptor = self._descriptors.get(run_id)
            if descriptor is None:
                descriptor = self._open(run_id)
            else:
                self._descriptors.move_to_end(run_id)
            os.write(descriptor, data)

    def _open(self, run_id: str) -> int:
        file = self.file(run_id)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")  # closes a torn line, so that it does not swallow the next one
        self._descriptors[run_id] = descriptor
        while len(self._descriptors) > _OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def read(self, run_id: str) -> list[str]:
        """The run's marks, oldest first. A line that was torn by a power loss is left out."""
        try:
            data = self.file(run_id).read_bytes()
        except FileNotFoundError:
            return []
        lines = []
        for line in data.split(b"\n"):
            length, colon, text = line.partition(b":")
            if colon and length == b"%x" % len(text):
                lines.append(text.decode(errors="replace"))
        return lines

    def size(self, run_id: str) -> int:
        """The size of the run's side file in bytes; 0 when there is none."""
        try:
            return self.file(run_id).stat().st_size
        except FileNotFoundError:
            return 0

    def clear(self, run_id: str) -> None:
        """Remove the run's side file."""
        with self._lock:
            descriptor = self._descriptors.pop(run_id, None)
            if descriptor is not None:
                os.close(descriptor)
        self.file(run_id).unlink(missing_ok=True)

    def file(self, run_id: str) -> Path:
        """The run's side file; it need not exist."""
        safe = "".join(
            chr(byte) if (chr(byte).isalnum() and byte < 128) or byte in b"-_" else f"%{byte:02x}"
            for byte in run_id.encode()
        )
        if len(safe) > 200:
            import hashlib

            safe = f"{safe[:150]}%{hashlib.sha256(run_id.encode()).hexdigest()}"
        return self._folder / f"{safe}.log"
