"""What a journal's directory must look like: every check that open() makes, and its error.

``journal.json`` beside the database names the store and carries a lower bound of its commits (store.SEQUENCE):
written after each fsynced commit, itself never synced, so it can lag behind but never be ahead of what is durable. A
database with fewer commits than that has lost some: its ``-wal`` was not copied along, or an older copy was put back.
"""

from __future__ import annotations

import functools
import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import NamedTuple

from agentflow.errors import JournalError, JournalForeign, JournalIncomplete, JournalReadOnly, JournalVersionError
from agentflow.pgurl import Place
from agentflow.pgurl import place as placed
from agentflow.store import DB_NAME, SEQUENCE

LAYOUT_VERSION = 1
DIGEST_VERSION = 1
SIBLING = "journal.json"
# diskcache stores them in the file, where any opener can change them: checked at every open.
SETTINGS: dict[str, object] = {
    "cull_limit": 0,
    "disk_agentflow_layout": LAYOUT_VERSION,
    "disk_min_file_size": 2**62,
    "eviction_policy": "none",
    "size_limit": 2**62,
    "sqlite_journal_mode": "wal",
    "sqlite_synchronous": 2,
    "statistics": 0,
    "tag_index": 0,
}
# A row that goes leaves the sequence of commits as it is: what counts there is that it was added once.
COUNT_DELETE = """CREATE TRIGGER Settings_count_delete AFTER DELETE ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value - 1 WHERE key = 'count';
    UPDATE Agentflow SET value = value + 1 WHERE key = 'commits'; END"""
_NETWORK = {
    *("9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.davfs2", "fuse.gcsfuse", "fuse.glusterfs"),
    *("fuse.rclone", "fuse.s3fs", "fuse.sshfs", "fuse.sshfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"),
    *("prl_fs", "smb3", "smbfs", "vboxsf", "vmhgfs"),
}
# Where a page of a file that was synced once can always be written again: on a copy-on-write file system that is
# full, a write through a mapping would end the process instead of raising.
_MAPPABLE = {"ext2", "ext3", "ext4", "xfs", "tmpfs"}
_OWN = (SIBLING, ".gitignore", ".DS_Store", "started")


class Sibling(NamedTuple):
    """``journal.json``: the store it belongs to, and how many commits that store has at least (store.SEQUENCE)."""

    store: str
    commits: int
    offset: int  # of the 20 digits of ``commits`` in the file


def read_sibling(folder: Path) -> Sibling | None:
    """The checked contents of ``journal.json``; None when there is no such file."""
    try:
        text = (folder / SIBLING).read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise JournalReadOnly(f"{folder}: {SIBLING} cannot be read ({error.strerror}).") from error
    except (OSError, ValueError) as error:
        raise JournalIncomplete(_damaged(folder)) from error
    try:
        data = json.loads(text)
        layout, digest = data["layout"], data["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise JournalIncomplete(_damaged(folder)) from error
    check_versions(folder, layout, digest)
    try:
        return Sibling(str(data["store"]), int(data["commits"]), text.index('"commits":"') + 11)
    except (ValueError, KeyError) as error:
        raise JournalIncomplete(_damaged(folder)) from error


def _damaged(folder: Path) -> str:
    return (
        f"{folder}: {SIBLING} is damaged, so nothing tells whether records are missing. Restore the whole directory "
        "from a backup, or move it away to begin an empty journal."
    )


def check_versions(folder: Place, layout: object, digest: object) -> None:
    """Refuse what another version of agentflow wrote."""
    for what, found, known in (("layout", layout, LAYOUT_VERSION), ("digest", digest, DIGEST_VERSION)):
        if str(found) != str(known):
            raise JournalVersionError(
                f"{folder}: written with {what} version {found}; this agentflow knows {known}. Use the agentflow that "
                "wrote it, or set AGENTFLOW_PATH to another place. Nothing was changed."
            )


def write_sibling(folder: Path, store: str, commits: int) -> None:
    """Create ``journal.json``, whole or not at all."""
    temporary = folder / f"new-{os.getpid()}-{SIBLING}"
    text = f'{{"layout":{LAYOUT_VERSION},"digest":{DIGEST_VERSION},"store":"{store}","commits":"{commits:020d}"}}\n'
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, text.encode("ascii"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, folder / SIBLING)


def check_new(folder: Path) -> None:
    """Refuse to begin a journal among files that are not ours."""
    strange = sorted(
        name for name in os.listdir(folder) if name not in _OWN and not name.startswith(("new-", "spill-", DB_NAME))
    )
    if not strange and (folder / DB_NAME).exists() and not _is_ours(folder / DB_NAME):
        strange = [DB_NAME]
    if strange:
        shown = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        raise JournalForeign(
            f"{folder} holds something else than an agentflow journal ({shown}). Set AGENTFLOW_PATH to an empty or new "
            "directory. Nothing was changed."
        )


def _is_ours(path: Path) -> bool:
    if path.stat().st_size == 0:
        return False
    con = sqlite3.connect(path, isolation_level=None)
    try:
        return con.execute("SELECT 1 FROM sqlite_master WHERE name = 'Agentflow'").fetchone() is not None
    except sqlite3.Error:
        return False
    finally:
        con.close()


def check_store(folder: Path, con: sqlite3.Connection, sibling: Sibling) -> tuple[int, str]:
    """Compare database and sibling. Returns the sequence of commits, and what somebody changed, comma-separated."""
    try:
        own = dict(con.execute("SELECT key, value FROM Agentflow").fetchall())
        settings = dict(con.execute("SELECT key, value FROM Settings").fetchall())
        trigger = con.execute("SELECT sql FROM sqlite_master WHERE name = 'Settings_count_delete'").fetchone()
        sequence = con.execute(SEQUENCE).fetchone()[0]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise
        raise JournalIncomplete(
            _incomplete(folder, f"{DB_NAME} is empty or not the one {SIBLING} belongs to")
        ) from error
    check_versions(folder, own.get("layout"), own.get("digest"))
    if own.get("store") != sibling.store:
        raise JournalIncomplete(_incomplete(folder, f"{SIBLING} and {DB_NAME} belong to different journals"))
    if sequence < sibling.commits:
        missing = sibling.commits - sequence
        raise JournalIncomplete(
            _incomplete(
                folder,
                f"at least {missing} commits are missing from {DB_NAME} (was it copied without "
                f"{DB_NAME}-wal?)",
            )
        )
    changed = [name for name, value in SETTINGS.items() if settings.get(name) != value]
    if trigger != (COUNT_DELETE,):
        changed.append("Settings_count_delete")
    return sequence, ", ".join(changed)


def _incomplete(folder: Path, what: str) -> str:
    return (
        f"{folder}: {what}. Running on could pay again for what is lost. Copy or restore the whole directory "
        "(`agentflow journal backup` makes a complete copy), or move it away to begin an empty journal."
    )


def missing_store(folder: Path) -> JournalIncomplete:
    """The error for a sibling without its database."""
    return JournalIncomplete(_incomplete(folder, f"{DB_NAME} is missing or empty"))


def lost_sibling(folder: Path) -> JournalIncomplete:
    """The error for a database with records and no sibling."""
    return JournalIncomplete(_incomplete(folder, f"{SIBLING} is missing, so nothing tells whether records are too"))


def check_place(folder: Path, mounts: str | None = None) -> None:
    """Refuse network file systems and folders that a sync service rewrites behind SQLite's back.

    Args:
        folder: an absolute path; it need not exist.
        mounts: text like /proc/mounts; None reads the system's own where there is one.
    """
    synced = _synced(folder)
    if synced:
        raise JournalError(
            f"{folder} lies in a folder that {synced} synchronises, which corrupts databases in use. Set "
            "AGENTFLOW_PATH to a local directory that is not synchronised."
        )
    kind = _mount_kind(str(folder), mounts)
    if kind in _NETWORK:
        raise JournalError(
            f"{folder} is on a network file system ({kind}), where file locks cannot be relied on. Set "
            "AGENTFLOW_PATH to a directory on a local disk."
        )


def can_map(folder: Path, mounts: str | None = None) -> bool:
    """Whether files of this folder may be written through a memory mapping, a full disk included.

    Args:
        folder: an absolute path.
        mounts: text like /proc/mounts; None reads the system's own where there is one.
    """
    return _mount_kind(str(folder), mounts) in _MAPPABLE


def _synced(folder: Path) -> str | None:
    for part in folder.parts:
        low = part.lower()
        if low == "dropbox" or low.startswith(("dropbox (", "dropbox-")):
            return "Dropbox"
        if low == "onedrive" or low.startswith(("onedrive -", "onedrive-")):
            return "OneDrive"
        if low in ("mobile documents", "icloud drive", "iclouddrive", "com~apple~clouddocs"):
            return "iCloud"
        if low in ("google drive", "googledrive", "my drive") or low.startswith("googledrive-"):
            return "Google Drive"
    return None


def _mount_kind(folder: str, mounts: str | None) -> str:
    if mounts is None:
        try:
            with open("/proc/mounts", encoding="utf-8", errors="surrogateescape") as file:
                mounts = file.read()
        except OSError:
            return ""
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1]
        if "\\" in point:
            point = point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        point = point.rstrip("/")
        # The last mount on a point hides earlier ones, hence >=.
        if len(point) >= best and (folder == point or folder.startswith(point + "/")):
            best, kind = len(point), fields[2]
    return kind


@functools.cache
def _installed() -> set[str]:
    import sysconfig  # only when no path was given

    paths = [sysconfig.get_paths(), sysconfig.get_paths(sysconfig.get_preferred_scheme("user"))]
    return {each[name] for each in paths for name in ("stdlib", "purelib", "platlib", "scripts")}


def default_path(start: Path | None = None) -> Place:
    """Where the journal is when nothing says otherwise.

    Args:
        start: a directory to look from instead of the main script's. None: the script's.

    ``AGENTFLOW_PATH``; else ``.agentflow`` at the project root: the nearest directory with a
    pyproject.toml or .git among the main script's ancestors, else among the working directory's.
    Without such a directory it is beside the script, or in the working directory. A program that is
    installed with Python (a notebook's kernel, pytest, the command line) is nobody's script.
    """
    named = os.environ.get("AGENTFLOW_PATH")
    if named:
        there = placed(named)
        return Path(os.path.abspath(there)) if isinstance(there, Path) else there
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    beside = Path(os.path.abspath(script)).parent if script else None
    if start is not None:
        beside = start
    elif beside is not None and any(beside.is_relative_to(place) for place in _installed()):
        beside = None
    here = Path.cwd()
    for place in (beside, here):
        for folder in (place, *place.parents) if place is not None else ():
            if (folder / "pyproject.toml").is_file() or (folder / ".git").exists():
                return folder / ".agentflow"
    return (beside or here) / ".agentflow"
