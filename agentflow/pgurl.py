"""Where a journal in PostgreSQL is: a URL whose password is nobody's business."""

from __future__ import annotations

import os
import re
from pathlib import Path

from agentflow.errors import UsageError

# Compiled when there is a URL: most programs have none.
_URL = r"(postgres(?:ql)?)://(?:([^/?#@]*)@)?([^?#]*)(?:\?([^#]*))?\Z"
_NAME = r"[a-z_][a-z0-9_]{0,62}\Z"
_SECRET = ("password", "sslpassword")
SCHEMA = "agentflow"


class PostgresURL:
    """``postgresql://user@host:5432/database?schema=agentflow``, as libpq takes it, with the schema of the journal.

    As text, and wherever else it is shown, it has no password. Two with the same parts are equal.

    Attributes:
        conninfo: what libpq is given; holds the password if there is one.
        schema: the schema that holds the journal.

    Raises:
        UsageError: it is no such URL, or the schema's name is none that needs no quotes.
    """

    __slots__ = ("_secrets", "_shown", "conninfo", "schema")

    def __init__(self, text: str) -> None:
        match = re.match(_URL, text)
        if match is None:
            raise UsageError(
                "the journal's place begins like a PostgreSQL URL and is none. Write "
                "postgresql://user@host:5432/database, with %40 for an @ in a password, %2F for a /."
            )
        kind, user, where, query = match.groups()
        name, colon, password = (user or "").partition(":")
        secrets = [password] if colon else []
        kept, shown = [], []
        self.schema = SCHEMA
        for parameter in (query or "").split("&"):
            key, _, value = parameter.partition("=")
            if key == "schema":
                self.schema = value
            elif key in _SECRET:
                secrets.append(value)
                kept.append(parameter)
            elif parameter:
                kept.append(parameter)
                shown.append(parameter)
        if not re.match(_NAME, self.schema):
            raise UsageError(
                f"?schema={self.schema}: the name of a schema has small letters, digits and _ here, 63 of them at most."
            )
        if self.schema != SCHEMA:
            shown.append(f"schema={self.schema}")
        at = "" if user is None else f"{user}@"
        self.conninfo = f"{kind}://{at}{where}" + (f"?{'&'.join(kept)}" if kept else "")
        self._shown = f"{kind}://{name + '@' if name else ''}{where}" + (f"?{'&'.join(shown)}" if shown else "")
        self._secrets = tuple(secret for secret in secrets if secret)

    @property
    def whole(self) -> str:
        """All of it, the password included: for the environment of a process that is to use the same journal."""
        schema = "" if self.schema == SCHEMA else f"schema={self.schema}"
        mark = "&" if "?" in self.conninfo else "?"
        return self.conninfo + (mark + schema if schema else "")

    def without_secrets(self, text: str) -> str:
        """The text, with ``***`` where it holds the password."""
        from urllib.parse import unquote

        for secret in self._secrets:
            for form in {secret, unquote(secret)}:
                text = text.replace(form, "***") if len(form) > 2 else text
        return text

    def __str__(self) -> str:
        return self._shown

    def __repr__(self) -> str:
        return f"PostgresURL({self._shown!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PostgresURL) and (self.conninfo, self.schema) == (other.conninfo, other.schema)

    def __hash__(self) -> int:
        return hash((self.conninfo, self.schema))


Place = Path | PostgresURL


def place(where: str | os.PathLike[str] | PostgresURL) -> Place:
    """A journal's place as somebody names it: a directory, or the URL of a database.

    Raises:
        UsageError: a URL that is none, or one that went through ``Path``, which drops a slash of it.
    """
    if isinstance(where, PostgresURL):
        return where
    text = os.fspath(where)
    if text.startswith(("postgresql://", "postgres://")):
        return PostgresURL(text)
    if text.startswith(("postgresql:", "postgres:")):
        raise UsageError("a journal in PostgreSQL is named by text, postgresql://user@host/database, not by a Path.")
    return (where if isinstance(where, Path) else Path(text)).expanduser()
