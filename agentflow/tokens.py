"""How many tokens a request has, before it is sent; says how sure that is, and never waits for a download.

``exact``: tiktoken knows the model, and nothing but plain text is asked. ``assumed``: counted with the encoding that
newer models of the same maker have, or with schemas and tools written out as text. ``estimated``: a token for every
three bytes, because the model's tokenizer is not public, its file is not on this machine, or files are shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

BYTES_A_TOKEN = 3  # English has more than four, Chinese three, code three: an estimate that is rarely too low
# https://platform.openai.com/docs/guides/images-vision, https://platform.claude.com/docs/en/build-with-claude/vision
IMAGE_TOKENS = 2_000
# A page of 12 KB has 3,000 tokens: https://platform.claude.com/docs/en/build-with-claude/pdf-support
PDF_BYTES_A_TOKEN = 4
MOST_CHARACTERS = 1_000_000  # longer texts are estimated: counting them would take seconds
_A_MESSAGE, _THE_REPLY = 4, 3  # https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken, role included

_FILES = {
    "o200k_base": (
        "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
    "cl100k_base": (
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
}
_loaded: dict[str, Any] = {}
_lock = threading.Lock()


class Count(NamedTuple):
    """Input tokens of a request, and how they were found: ``exact``, ``assumed`` or ``estimated``."""

    tokens: int
    how: str

    def __str__(self) -> str:
        return f"{self.tokens:,} input tokens ({self.how})"


def count(provider: str, model: str, body: dict[str, Any]) -> Count:
    """The input tokens of a request, with the model's tokenizer if ``warm`` has loaded it.

    Args:
        provider: ``openai``, ``openai-chat``, ``anthropic`` or the name of a registered server.
        model: the model's name, without a provider in front.
        body: the request as it is sent.
    """
    asked = _Asked()
    asked.look({name: value for name, value in body.items() if name not in ("model", "stream")})
    estimate = asked.bytes // BYTES_A_TOKEN + 1 + asked.extra
    name, known = encoding_of(provider, model)
    if name is None or asked.extra or sum(map(len, asked.texts)) > MOST_CHARACTERS:
        return Count(estimate, "estimated")
    encoding = _loaded.get(name)
    if encoding is None:
        return Count(estimate, "estimated")
    tokens = sum(len(encoding.encode_ordinary(text)) for text in asked.texts)
    return Count(tokens + asked.messages * _A_MESSAGE + _THE_REPLY, "exact" if known and asked.plain else "assumed")


async def warm(provider: str, model: str) -> None:
    """Loads the tokenizer of a model if it is on this machine: half a second, in another thread, once a process."""
    name, _ = encoding_of(provider, model)
    if name is not None and name not in _loaded:
        await asyncio.to_thread(load, name)


def encoding_of(provider: str, model: str) -> tuple[str | None, bool]:
    """The encoding of a model, None where it is not public; and whether tiktoken knows it."""
    if provider not in ("openai", "openai-chat", "azure"):
        return None, False
    import tiktoken

    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        return "o200k_base", False
    return (name, True) if name in _FILES else (None, False)


def load(name: str) -> None:
    """Loads an encoding if its file is on this machine as tiktoken expects it: any other it would download anew."""
    with _lock:
        if name in _loaded:
            return
        import tiktoken
        from tiktoken import registry

        here = name in registry.ENCODINGS or _is_here(name)
        _loaded[name] = tiktoken.get_encoding(name) if here else None


def _is_here(name: str) -> bool:
    """Whether tiktoken's cache holds the file with the content that tiktoken itself will ask for."""
    from tiktoken_ext import openai_public

    url, sha256 = _FILES[name]
    if not {url, sha256} <= set(getattr(openai_public, name).__code__.co_consts):
        return False  # another version of tiktoken, which would ask for another file
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if folder is None:
        folder = os.environ.get("DATA_GYM_CACHE_DIR")
    if folder is None:
        import tempfile

        folder = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    if not folder:
        return False  # an empty name switches the cache off
    try:
        content = (Path(folder) / hashlib.sha1(url.encode()).hexdigest()).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == sha256


class _Asked:
    """What a body asks: its texts, how long it is without the files in it, and what those come to."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.bytes = 0
        self.extra = 0
        self.messages = 0
        self.plain = True

    def look(self, body: dict[str, Any]) -> None:
        for name, value in body.items():
            if name in ("input", "messages") and isinstance(value, list) and all(isinstance(v, dict) for v in value):
                for message in value:
                    self.messages += 1
                    self._part(message, name="")
            elif name in ("instructions", "system", "input"):
                self.messages += 1
                self._part(value, name="")
            elif isinstance(value, dict | list):
                self.plain = False
                self._text(json.dumps(value, ensure_ascii=False))
            else:
                self.bytes += len(str(value)) + len(name)
            self.bytes += len(name) + 6

    def _part(self, value: Any, name: str) -> None:
        if isinstance(value, str):
            if value.startswith("data:"):
                self._file(value, value[5:40].partition(";")[0])
            elif name in ("role", "type"):
                self.bytes += len(value)
            else:
                self._text(value)
        elif isinstance(value, dict):
            if value.get("type") == "base64":
                self._file(str(value.get("data")), str(value.get("media_type")))
                return
            for key, inner in value.items():
                self.bytes += len(key) + 6
                self._part(inner, key)
            if value.get("type") not in (None, "text", "input_text", "output_text", "message"):
                self.plain = False
        elif isinstance(value, list):
            for inner in value:
                self.bytes += 2
                self._part(inner, name)
        else:
            self.bytes += len(str(value))

    def _text(self, text: str) -> None:
        self.texts.append(text)
        self.bytes += len(text.encode("utf-8", "surrogatepass"))

    def _file(self, data: str, media_type: str) -> None:
        self.extra += IMAGE_TOKENS if media_type.startswith("image/") else len(data) // PDF_BYTES_A_TOKEN
