"""Where paid replies go when the journal cannot take them: memory, and a synced file until it can.

Spilled records count as recorded: the journal's reads see them, and the next transaction that succeeds, in
this process or at the next open, takes them in. A file is removed only after that transaction is fsynced; if
the process dies in between, importing it once more changes nothing, because the first record wins.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from agentflow.errors import LeaseLost
from agentflow.ops import Add, Drop, Fence, Op, Put, Txn
from agentflow.voice import log


class _Entry:
    __slots__ = ("fence", "file", "ops")

    def __init__(self, ops: Sequence[Op], fence: Fence | None, file: Path | None) -> None:
        self.ops = ops
        self.fence = fence
        self.file = file


class Spill:
    """The spilled records of one store. False when there are none.

    Args:
        place: the journal, for what is said.
        store: its id.
        folder: a directory that is there for them; None: there is none but this user's own.
        cure: what people are to do so that the journal can be written again.
    """

    def __init__(self, place: object, store: str, folder: Path | None, cure: str) -> None:
        self._place = place
        self._folder = folder
        self._store = store
        self._cure = cure
        self._entries: list[_Entry] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def forked(self) -> None:
        """Begin anew in a child process."""
        self._lock = threading.Lock()

    def add(self, ops: Sequence[Op], fence: Fence | None) -> None:
        """Keep the ops in memory and, wherever that is possible, in a synced file. Never raises."""
        file = None
        for folder in self._folders():
            try:
                file = self._write(folder, ops, fence)
                break
            except OSError as error:
                log.debug("spilling to %s failed: %s", folder, error)
        with self._lock:
            self._entries.append(_Entry(list(ops), fence, file))
        if file is None:
            log.error(
                "%s: a paid reply could neither be recorded nor saved in a file; it is kept in memory only. %s before "
                "this process ends.",
                self._place,
                self._cure,
            )
        else:
            log.warning(
                "%s: a paid reply could not be recorded and was saved in %s; it will be taken in when the journal can "
                "be written again. %s.",
                self._place,
                file,
                self._cure,
            )

    def load(self) -> None:
        """Read what earlier processes have spilled."""
        known = {entry.file for entry in self._entries}
        for folder in self._folders(make=False):
            for name in sorted(os.listdir(folder)):
                file = folder / name
                if name.startswith("spill-") and name.endswith(".json") and file not in known:
                    try:
                        entry = self._read(file)
                    except (OSError, ValueError, KeyError, TypeError) as error:
                        log.warning("%s: this spilled reply cannot be read and was left alone: %s", file, error)
                        continue
                    if entry is not None:
                        self._entries.append(entry)

    def take_in(self, txn: Txn) -> Callable[[], None]:
        """Write all spilled ops; the returned function is to be called once the transaction is fsynced."""
        with self._lock:
            entries = list(self._entries)
        for entry in entries:
            if entry.file is not None and not entry.file.exists():
                continue  # another process has taken it in
            ops = entry.ops
            if entry.fence is not None:
                try:
                    txn.check(entry.fence)
                except LeaseLost:
                    # Somebody else went on with the run: its documents are newer, but the paid reply still counts.
                    ops = [op for op in ops if isinstance(op, Add)]
            txn.apply(ops)
        return lambda: self._done(entries)

    def _done(self, entries: list[_Entry]) -> None:
        with self._lock:
            self._entries = [entry for entry in self._entries if entry not in entries]
        for entry in entries:
            if entry.file is not None:
                entry.file.unlink(missing_ok=True)

    # -- what readers see -------------------------------------------------------------------------

    def see(self, key: str, recorded: str | None) -> str | None:
        """The value of a key, given what the database has."""
        for op in self._ops():
            if op.key == key:
                if isinstance(op, Add):
                    recorded = op.value if recorded is None else recorded
                else:
                    recorded = op.value if isinstance(op, Put) else None
        return recorded

    def keys(self, prefix: str) -> list[str]:
        """Spilled keys that begin with ``prefix``, sorted."""
        return sorted({op.key for op in self._ops() if op.key.startswith(prefix)})

    def _ops(self) -> Iterator[Op]:
        for entry in list(self._entries):
            yield from entry.ops

    # -- files ------------------------------------------------------------------------------------

    def _folders(self, *, make: bool = True) -> Iterator[Path]:
        """The journal's directory, or this user's own one for state, then one in the temporary directories."""
        bases = [os.environ.get("TMPDIR"), "/tmp", "/var/tmp"]
        if self._folder is not None:
            yield self._folder
        else:
            bases.insert(0, os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
        for base in bases:
            if not base:
                continue
            folder = Path(base) / f"agentflow-{os.getuid()}-{self._store}"
            try:
                if make:
                    os.makedirs(base, exist_ok=True)
                    folder.mkdir(mode=0o700, exist_ok=True)
                stat = os.lstat(folder)
            except OSError:
                continue
            # Anybody can make a directory of this name there; believe only what nobody else can write.
            if stat.st_uid == os.getuid() and stat.st_mode & 0o170077 == 0o040000:
                yield folder

    def _write(self, folder: Path, ops: Sequence[Op], fence: Fence | None) -> Path:
        data = {
            "store": self._store,
            "fence": None if fence is None else [fence.key, fence.token],
            "ops": [[type(op).__name__, op.key, None if isinstance(op, Drop) else op.value] for op in ops],
        }
        file = folder / f"spill-{os.getpid()}-{os.urandom(8).hex()}.json"
        part = file.with_suffix(".part")
        try:
            with open(part, "x", encoding="utf-8", opener=_private) as handle:
                json.dump(data, handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(part, file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return file

    def _read(self, file: Path) -> _Entry | None:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["store"] != self._store:
            return None
        ops: list[Op] = [
            Drop(key) if kind == "Drop" else (Add(key, value) if kind == "Add" else Put(key, value))
            for kind, key, value in data["ops"]
        ]
        fence = data["fence"]
        return _Entry(ops, None if fence is None else Fence(str(fence[0]), int(fence[1])), file)


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)
