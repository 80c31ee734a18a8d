"""Masks secrets in what leaves the journal: exports, recordings, the page, traces, logs, exception text.

The journal itself holds what was sent and received, and digests are taken of that; masks come after. A mask depends on
the text alone (and, for values of environment variables, on the variable's name), so recordings stay comparable.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agentflow.errors import UsageError

Extra = Callable[[str], str] | Mapping[str, str | re.Pattern[str]] | Iterable[str | re.Pattern[str]] | None

# Patterns are compiled when a text may hold what they look for: most texts hold none of it, and a short program does
# not wait for twenty of them. Each comes with words of which one stands in every match, in small letters.
_Pattern = tuple[str, tuple[str, ...], str]
# Formats that are secrets wherever they stand. Longer prefixes first: sk-ant- is an sk- too.
_KEYS: tuple[_Pattern, ...] = (
    (
        "private-key",
        ("-----begin ",),
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
        r"(?:(?:(?!-----BEGIN )[\s\S]){0,20000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
        r"|(?:[A-Za-z0-9+/=\s]|\\[nr])*)",
    ),
    ("anthropic-key", ("sk-ant-",), r"\bsk-ant-[A-Za-z0-9_-]{16,}"),
    ("openrouter-key", ("sk-or-v1-",), r"\bsk-or-v1-[0-9a-f]{32,}"),
    (
        "openai-key",
        ("sk-",),
        r"\bsk-(?:(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{20,}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,})",
    ),
    ("aws-key", ("akia", "asia"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    (
        "github-token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    ),
    ("gitlab-token", ("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("slack-token", ("xox",), r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    ("google-key", ("aiza",), r"\bAIza[0-9A-Za-z_-]{35}"),
    ("stripe-key", ("k_live_", "k_test_"), r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"),
    ("huggingface-token", ("hf_",), r"\bhf_[A-Za-z0-9]{30,}"),
    ("jwt", ("eyj",), r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
)
_SECRET_NAME = (
    r"api[-_]?key|(?:access|auth|refresh|session|bearer|id)[-_]?token|client[-_]?secret"
    r"|(?:secret|private)[-_]?(?:access[-_]?)?key|password|passwd"
)
_MASK = r"\[redacted:[^\]\s]*\]"
# Secrets known by what stands before them: group 1 stays, the rest goes.
_BEARER: _Pattern = (
    "bearer-token",
    ("bearer",),
    r"(?i)\b(bearer[ \t]+)(?=[a-z._~+/=-]*[0-9])[a-z0-9._~+/=-]{16,}",
)
_BASIC: _Pattern = (
    "authorization",
    ("basic",),
    r"(?i)(\bauthorization\\?[\"']?\s*[:=]\s*\\?[\"']?basic[ \t]+)[a-z0-9+/=]{8,}",
)
_IN_URL: _Pattern = (
    "password",
    ("://",),
    r"(\b[a-z][a-z0-9+.-]{0,30}://[^\s:/@\"']{0,200}:)(?!\[redacted:)[^\s@/\"']{3,500}(?=@)",
)
_NAMED: _Pattern = (
    "",
    ("key", "token", "secret", "passw"),
    rf"(?i)((?<![a-z0-9])(?:x[-_])?({_SECRET_NAME})\\?[\"']?\s{{0,9}}[:=]\s{{0,9}}(?:b?\\?[\"'])?)"
    # not a mask, a placeholder, or code that fetches the secret
    r"(?!\[redacted:|[<{$*(]|os\.|env[.(]|your[-_])(?=[^\s\"',;&}<>)\\]*[0-9])[^\s\"',;&}<>)\\(\[]{8,}",
)
_NAME = rf"(?i)(?:.*[-_.])?({_SECRET_NAME}|authorization|(?:set-)?cookie)"
_ENV_NAMES = ("_API_KEY", "_TOKEN", "_SECRET", "_PASSWORD")


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)



_extra_patterns: list[tuple[str, re.Pattern[str]]] = []
_extra_function: Callable[[str], str] | None = None


def redact(text: str) -> str:
    """Replace every secret that can be recognised by a mask such as ``[redacted:openai-key]``.

    Recognised are well-known key formats, values (8 characters or more) of environment variables whose names end with
    ``_API_KEY``, ``_TOKEN``, ``_SECRET`` or ``_PASSWORD``, what follows ``Bearer``, ``api_key=``, ``"x-api-key":`` and
    the like, passwords in URLs, and what :func:`set_extra` added.

    >>> redact("Authorization: Bearer abcdefghij0123456789")
    'Authorization: Bearer [redacted:bearer-token]'
    """
    return _redact(text, _environment())


def redact_value(tree: Any) -> Any:
    """A copy of a tree of dicts, lists and tuples with every string redacted.

    Under a key that names a secret (``api_key``, ``authorization``, ``password``) the whole string goes, whatever its
    format. Numbers and other objects stay as they are.

    >>> redact_value({"headers": {"X-Api-Key": "hunter22", "Accept": "text/html"}})
    {'headers': {'X-Api-Key': '[redacted:api-key]', 'Accept': 'text/html'}}
    """
    return _redact_tree(tree, _environment(), None)


def set_extra(patterns: Extra) -> None:
    """Add your own secrets to what is masked; replaces what was set before.

    Args:
        patterns: regular expressions (masked as ``[redacted:custom]``), a dict of name to regular expression (masked as
            ``[redacted:name]``), or a function from text to text, called last. None removes them.

    Raises:
        UsageError: a pattern does not compile.
    """
    global _extra_function, _extra_patterns
    compiled = []
    if patterns is not None and not callable(patterns):
        if isinstance(patterns, (str, re.Pattern)):
            patterns = [patterns]
        named = patterns.items() if isinstance(patterns, Mapping) else [("custom", pattern) for pattern in patterns]
        try:
            compiled = [(name, re.compile(pattern)) for name, pattern in named]
        except (re.error, TypeError) as exc:
            raise UsageError(f"redaction pattern is no regular expression: {exc}") from exc
    _extra_patterns = compiled
    _extra_function = patterns if callable(patterns) else None


def _redact(text: str, environment: list[tuple[str, str]]) -> str:
    before = None
    while before != text:  # a mask ends the word it replaces, which can bring out a secret glued to it
        before = text
        text = _redact_once(text, environment)
    if _extra_function is not None:
        text = _extra_function(text)
        if not isinstance(text, str):
            raise UsageError(f"the redaction function must return text, not {type(text).__name__}")
    return text


def _redact_once(text: str, environment: list[tuple[str, str]]) -> str:
    # Three letters outside ASCII count as s or i where case is ignored; the Kelvin sign has k as its small letter.
    small = text.replace("\u0130", "i").lower().replace("\u017f", "s").replace("\u0131", "i")
    for key in _KEYS:
        text = _mask(key, f"[redacted:{key[0]}]", text, small)
    # before the patterns below, which could cut such a value in two
    for value, mask in environment:
        if value in text:
            text = _sub(re.compile(re.escape(value)), mask, text)
    for before in (_BEARER, _BASIC, _IN_URL):
        text = _mask(before, rf"\1[redacted:{before[0]}]", text, small)
    text = _mask(_NAMED, lambda match: f"{match[1]}{_mask_for(match[2])}", text, small)
    for name, pattern in _extra_patterns:
        text = _sub(pattern, f"[redacted:{name}]", text)
    return text


def _mask(pattern: _Pattern, mask: str | Callable[[re.Match[str]], str], text: str, small: str) -> str:
    if not any(word in small for word in pattern[1]):
        return text
    return _compiled(pattern[2]).sub(mask, text)


def _redact_tree(tree: Any, environment: list[tuple[str, str]], name: str | None) -> Any:
    if isinstance(tree, str):
        text = _redact(tree, environment)
        return text if name is None or not text or _compiled(_MASK).fullmatch(text) else _mask_for(name)
    if isinstance(tree, dict):
        out = {}
        for key, item in tree.items():
            match = _compiled(_NAME).fullmatch(key) if isinstance(key, str) else None
            plain = _redact(key, environment) if isinstance(key, str) else key
            out[plain] = _redact_tree(item, environment, match[1] if match else None)
        return out
    if type(tree) in (list, tuple):
        return type(tree)(_redact_tree(item, environment, name) for item in tree)
    return tree


def _mask_for(name: str) -> str:
    name = name.lower()
    for word, mask in (("pass", "password"), ("token", "token"), ("client", "secret"), ("key", "api-key")):
        if word in name:
            return f"[redacted:{mask}]"
    return f"[redacted:{name}]"


def _sub(pattern: re.Pattern[str], mask: str, text: str) -> str:
    """Mask matches, except inside masks that are there already: redacting twice changes nothing."""
    there = _compiled(_MASK)
    pieces = there.split(text)
    masks = [*there.findall(text), ""]
    out = []
    for piece, old in zip(pieces, masks, strict=True):
        out += [pattern.sub(lambda match: mask if match.group() else "", piece), old]
    return "".join(out)


def _environment() -> list[tuple[str, str]]:
    """Secret values of the environment and their masks, longest first, also as they look inside JSON text."""
    found = {}
    for name, value in os.environ.items():
        if len(value) >= 8 and name.upper().endswith(_ENV_NAMES):
            found[value] = found[json.dumps(value)[1:-1]] = f"[redacted:{name}]"
    return sorted(found.items(), key=lambda pair: (-len(pair[0]), pair))
