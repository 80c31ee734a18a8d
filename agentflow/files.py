"""Files that are shown to a model: read, told apart by what is in them, and shortened in records."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentflow.errors import UsageError

_MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))
_GIF = (b"GIF87a", b"GIF89a")
_TEXT_NAMES = {".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".xml", ".html"}
_TAKEN = "png, jpeg, gif and webp images, PDF, and text in UTF-8"
_SHORTEST = 200  # characters of base64 that are worth shortening


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is shown: ``data`` is base64 for images and PDF, the text itself for text."""

    kind: str  # image, pdf, text
    media_type: str
    data: str
    number: int

    @property
    def name(self) -> str:
        """A name for APIs that demand one; never the file's own, so that renaming it changes nothing."""
        return f"file-{self.number}.{'pdf' if self.kind == 'pdf' else self.media_type.partition('/')[2]}"

    @property
    def url(self) -> str:
        """The content as a data URL."""
        return f"data:{self.media_type};base64,{self.data}"

    @property
    def shown(self) -> str:
        """A text file as it stands in a prompt."""
        return f'<file number="{self.number}">\n' + self.data.replace("</file", "<\\/file") + "\n</file>"


def load(files: Sequence[Any]) -> tuple[File, ...]:
    """The files of ``generate_content(files=[...])``: paths, or bytes.

    Raises:
        UsageError: names the entry that cannot be read or shown. Nothing was sent.
    """
    if isinstance(files, str | bytes | bytearray | os.PathLike) or not isinstance(files, Sequence):
        raise UsageError(f'files={str(files)[:80]!r}: write a list, such as files=["chart.png"]. Nothing was sent.')
    return tuple(_file(entry, number) for number, entry in enumerate(files, 1))


def _file(entry: Any, number: int) -> File:
    what = f"files[{number - 1}]"
    name = ""
    if isinstance(entry, bytes | bytearray | memoryview):
        content = bytes(entry)
    elif isinstance(entry, str | os.PathLike):
        path = Path(os.fsdecode(entry))
        name = path.suffix.lower()
        what = f"{what}: {str(path)[:200]}"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(f"{what}: there is no such file (from {Path.cwd()}). Nothing was sent.") from None
        except IsADirectoryError:
            raise UsageError(f"{what} is a directory; name the files in it. Nothing was sent.") from None
        except (OSError, ValueError) as exc:
            raise UsageError(f"{what} cannot be read: {exc}. Nothing was sent.") from exc
    else:
        raise UsageError(f"{what} is a {type(entry).__name__}: write a path, or bytes. Nothing was sent.")
    if not content:
        raise UsageError(f"{what} is empty. Nothing was sent.")
    media_type = _media_type(content)
    if media_type is not None:
        kind = "pdf" if media_type == "application/pdf" else "image"
        return File(kind, media_type, base64.b64encode(content).decode("ascii"), number)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        if name in _TEXT_NAMES or content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UsageError(f"{what} is not text in UTF-8 (byte {exc.start}): convert it. Nothing was sent.") from None
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{what} is of a type that cannot be shown: {_TAKEN} can. Nothing was sent.")
    return File("text", "text/plain", text, number)


def _media_type(content: bytes) -> str | None:
    """What the content says it is; names are not asked, for they lie."""
    for magic, media_type in _MAGIC:
        if content.startswith(magic):
            return media_type
    if content.startswith(_GIF):
        return "image/gif"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp"
    if b"%PDF-" in content[:1024]:
        return "application/pdf"
    return None


def attach(messages: list[dict[str, Any]], parts: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with ``parts`` shown before the words of the last one, if that is the user's.

    Args:
        messages: the conversation.
        parts: the files in the API's own words.
        text: the API's type of a part that is text.
    """
    if not parts:
        return messages
    last = messages[-1]
    content = last.get("content")
    if last.get("role") == "user" and isinstance(content, str):
        return [*messages[:-1], {**last, "content": [*parts, {"type": text, "text": content}]}]
    if last.get("role") == "user" and isinstance(content, list):
        return [*messages[:-1], {**last, "content": [*parts, *content]}]
    return [*messages, {"role": "user", "content": parts}]


def shortened(value: Any) -> Any:
    """A request as it is recorded and told from others: what is base64 in it stands as its digest and size."""
    if isinstance(value, dict):
        made = {key: shortened(item) for key, item in value.items()}
        if value.get("type") == "base64" and isinstance(value.get("data"), str):
            made["data"] = _digest(value["data"])
        return made
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if isinstance(value, str) and len(value) > _SHORTEST and value.startswith("data:"):
        head, mark, data = value.partition(";base64,")
        return f"{head};{_digest(data)}" if mark and len(head) < 100 else value
    return value


def _digest(data: str) -> str:
    if len(data) <= _SHORTEST:
        return data
    return f"sha256:{hashlib.sha256(data.encode('utf-8', 'surrogatepass')).hexdigest()} ({len(data)} characters)"
