"""Servers that speak a known API at another address: OpenRouter, Ollama, vLLM, Azure, and entries of one's own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from agentflow.errors import UsageError
from agentflow.models import Raw
from agentflow.providers.common import Ask, OnText, Parts, Server, transport

BUILT_IN = ("openai", "openai-chat", "anthropic")
_APIS = ("chat", "responses", "messages")
_STRUCTURED = ("schema", "json", "prompt")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FOREIGN = ("openai-organization", "openai-project")


@dataclass(frozen=True, slots=True)
class Entry:
    """A server as it was registered; holds names of environment variables, never what they hold."""

    name: str
    base_url: str | None
    base_url_env: str | None = None
    key_env: str | None = None
    api: str = "chat"
    structured: str = "schema"
    prices: str | None = None
    key_required: bool = True
    max_tokens: str = "max_tokens"
    path: str = ""


_PRESET = {
    # https://openrouter.ai/docs/api-reference/overview
    "openrouter": Entry(
        "openrouter", "https://openrouter.ai/api/v1", key_env="OPENROUTER_API_KEY", prices="openrouter"
    ),
    # https://docs.ollama.com/api/openai-compatibility; OLLAMA_HOST as in https://docs.ollama.com/faq
    "ollama": Entry(
        "ollama",
        "http://127.0.0.1:11434",
        base_url_env="OLLAMA_HOST",
        key_env="OLLAMA_API_KEY",
        key_required=False,
        path="/v1",
    ),
    # https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
    "vllm": Entry(
        "vllm",
        "http://localhost:8000/v1",
        base_url_env="VLLM_BASE_URL",
        key_env="VLLM_API_KEY",
        key_required=False,
    ),
    # https://learn.microsoft.com/azure/ai-foundry/openai/api-version-lifecycle
    "azure": Entry(
        "azure",
        None,
        base_url_env="AZURE_OPENAI_ENDPOINT",
        key_env="AZURE_OPENAI_API_KEY",
        prices="azure",
        max_tokens="max_completion_tokens",
        path="/openai/v1",
    ),
}
_entries: dict[str, Entry] = dict(_PRESET)


def register(
    name: str,
    *,
    base_url: str | None = None,
    base_url_env: str | None = None,
    key_env: str | None = None,
    api: Literal["chat", "responses", "messages"] = "chat",
    structured: Literal["schema", "json", "prompt"] = "schema",
    prices: str | None = None,
) -> None:
    """Makes ``model="name:..."`` go to another server; a second registration replaces the first.

    Args:
        name: what stands before the colon. The name is part of what a call was asked: under another
            name the same question is asked anew.
        base_url: where the API begins, as for the SDKs: with ``/v1`` for OpenAI's APIs, without for
            ``messages``. It is no part of what a call was asked: a server may move.
        base_url_env: an environment variable that holds the address and wins over ``base_url``.
        key_env: the environment variable that holds the key. None: the server needs none.
        api: ``chat`` (Chat Completions), ``responses`` (OpenAI Responses), ``messages`` (Anthropic).
        structured: how an output type is asked for: ``schema`` by strict JSON schema, ``json`` by JSON
            mode with the schema in the prompt, ``prompt`` by the prompt alone.
        prices: whose published prices hold, as genai-prices calls them, such as ``"groq"``. None: prices
            are unknown, and shown so, but for ``set_price``.

    Raises:
        UsageError: an argument cannot mean anything; names it.

    >>> register("lab", base_url="http://localhost:9000/v1", structured="json")
    >>> "lab" in known()
    True
    >>> forget("lab")
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"register(name={name!r}): write a word of letters, digits, '-', '_' and '.'.")
    if name in BUILT_IN or name == "ft":
        raise UsageError(f"register(name={name!r}): this name is built in and cannot be replaced. Choose another.")
    for what, variable in (("base_url_env", base_url_env), ("key_env", key_env)):
        if variable is not None and not (isinstance(variable, str) and _VARIABLE.fullmatch(variable)):
            raise UsageError(  # not quoted: it may be the key itself
                f'register({name!r}, {what}=...): write the name of an environment variable, such as "MINE_KEY", '
                "not what it holds."
            )
    if base_url is None and base_url_env is None:
        raise UsageError(f"register({name!r}): base_url= is missing; write the server's address, or base_url_env=.")
    if base_url is not None:
        _check_url(base_url, f"register({name!r}, base_url=...)")
    for what, value, allowed in (("api", api, _APIS), ("structured", structured, _STRUCTURED)):
        if value not in allowed:
            raise UsageError(f"register({name!r}, {what}={value!r}): one of {', '.join(map(repr, allowed))}.")
    if api == "messages" and structured == "json":
        raise UsageError(
            f"register({name!r}, structured='json'): the Messages API has no JSON mode. Use 'schema' or 'prompt'."
        )
    if prices is not None and not isinstance(prices, str):
        raise UsageError(f'register({name!r}, prices={prices!r}): a name that genai-prices knows, such as "groq".')
    _entries[name] = Entry(name, base_url, base_url_env, key_env, api, structured, prices)


def forget(name: str) -> None:
    """Takes a registration back; a name that came with the package is as it was."""
    _entries.pop(name, None)
    if name in _PRESET:
        _entries[name] = _PRESET[name]


def known() -> tuple[str, ...]:
    """The names of all providers, those that were registered included."""
    return (*BUILT_IN, *_entries)


def find(name: str) -> Compatible | None:
    """The provider of a registered name, or None."""
    entry = _entries.get(name)
    return None if entry is None else Compatible(entry)


class Compatible:
    """A registered server, with what a provider's module has: its API's own file does the work."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.NAME = entry.name
        self.SURFACE = entry.api
        self._api: Any = _surface(entry.api)

    def body(self, ask: Ask) -> dict[str, Any]:
        """The JSON body of one call; how the output type is asked for is the entry's ``structured``."""
        output = ask.output
        if output is not None and self.entry.structured != "schema":
            words = _in_words(output.plain)
            system = words if ask.system is None else f"{ask.system}\n\n{words}"
            ask = replace(ask, system=system, output=None)
        made: dict[str, Any] = self._api.body(ask)
        if output is not None and self.entry.structured == "json":
            if self.entry.api == "chat":
                made["response_format"] = {"type": "json_object"}
            else:
                made["text"] = {"format": {"type": "json_object"}}
        if self.entry.api == "chat" and "max_completion_tokens" in made:
            made[self.entry.max_tokens] = made.pop("max_completion_tokens")
        return made

    def messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The conversation a body holds, its system message first."""
        found: list[dict[str, Any]] = self._api.messages(body)
        return found

    def next_turn(self, body: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
        """The body that goes on with the conversation."""
        made: dict[str, Any] = self._api.next_turn(body, added)
        return made

    def tool_results(self, results: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
        """What is added to the conversation for calls of tools."""
        made: list[dict[str, Any]] = self._api.tool_results(results)
        return made

    def read(self, body: dict[str, Any]) -> Parts:
        """The parts of a reply."""
        parts: Parts = self._api.read(body, self.NAME)
        return parts

    async def send(
        self,
        body: dict[str, Any],
        timeout: float | None,
        *,
        on_text: OnText | None = None,
    ) -> Raw:
        """One POST to the server, with its own key and no header meant for anyone else."""
        raw: Raw = await self._api.send(body, timeout, on_text=on_text, server=self._server())
        return raw

    @property
    def embed(self) -> Callable[..., Awaitable[Raw]] | None:
        """One POST for vectors; None where the API has none."""
        send = getattr(self._api, "embed", None)
        return None if send is None else lambda body, timeout: send(body, timeout, server=self._server())

    @property
    def submit(self) -> Callable[..., Awaitable[Raw]] | None:
        """One POST that leaves a call in the background; None where the API has no such thing."""
        send = getattr(self._api, "submit", None)
        return None if send is None else lambda body, timeout: send(body, timeout, server=self._server())

    async def retrieve(self, ident: str, body: dict[str, Any], timeout: float) -> Raw:
        """One GET of a call in the background."""
        raw: Raw = await self._api.retrieve(ident, body, timeout, server=self._server())
        return raw

    async def cancel(self, ident: str, body: dict[str, Any], timeout: float) -> Raw:
        """Cancel a call in the background."""
        raw: Raw = await self._api.cancel(ident, body, timeout, server=self._server())
        return raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def _server(self) -> Server:
        entry = self.entry
        url = self._url()
        key = (os.environ.get(entry.key_env) if entry.key_env else None) or ""
        if not key and entry.key_env and entry.key_required and transport() is None:
            raise UsageError(f"{entry.name} cannot be asked: set {entry.key_env} in the environment. Nothing was sent.")
        version = os.environ.get("OPENAI_API_VERSION", "") if entry == _PRESET["azure"] else ""
        return Server(
            entry.name,
            lambda way: _make_client(entry, url, key or "none-needed", version, way),
            prices=entry.prices or "",
            key=(entry, url, key, version),
        )

    def _url(self) -> str:
        entry = self.entry
        given = os.environ.get(entry.base_url_env, "").strip() if entry.base_url_env else ""
        if entry.base_url_env and given:
            url = _ollama_host(given) if entry == _PRESET["ollama"] else given
            _check_url(url, entry.base_url_env)
        else:
            url = entry.base_url or ("http://no-address.invalid" if transport() is not None else "")
        if not url:
            raise UsageError(
                f"{entry.name} cannot be asked: set {entry.base_url_env} in the environment to the server's address. "
                "Nothing was sent."
            )
        url = url.rstrip("/")
        return url if url.endswith(entry.path) or not entry.path else url + entry.path


def _surface(api: str) -> Any:
    if api == "messages":
        from agentflow.providers import anthropic

        return anthropic
    if api == "responses":
        from agentflow.providers import openai

        return openai
    from agentflow.providers import openai_chat

    return openai_chat


_WORDS = "Answer with JSON alone, without any words around it, that fits this JSON schema:\n"


def _in_words(schema: dict[str, Any]) -> str:
    return _WORDS + json.dumps(schema, ensure_ascii=False)


def without_words(body: dict[str, Any]) -> None:
    """Takes out of a body what asks for an output type in words, wherever the API has its system message."""
    for name in ("instructions", "system"):
        if isinstance(body.get(name), str):
            body[name] = _wordless(body[name])
            if not body[name]:
                del body[name]
    messages: list[Any] = body.get("messages") or []
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") == "system" and isinstance(first.get("content"), str):
        text = _wordless(first["content"])
        body["messages"] = [*([{**first, "content": text}] if text else []), *messages[1:]]


def _wordless(text: str) -> str:
    before, _, schema = text.rpartition(_WORDS)
    # The schema is one line, at the end; the words anywhere else are the caller's.
    return text if not schema or "\n" in schema or _WORDS not in text else before.removesuffix("\n\n")


def _check_url(url: Any, what: str) -> None:
    """Refuses what is no address, without repeating it: it may hold a password."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        fine = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, fine = None, False
    if not fine or parts is None:
        raise UsageError(f'{what}: write an address such as "http://localhost:8000/v1".')
    if "@" in parts.netloc:
        raise UsageError(f"{what}: the address holds a user or password. Name the key's variable with key_env=.")
    if parts.query or parts.fragment:
        raise UsageError(f"{what}: an address without '?' and '#' is needed; nothing after them would be sent.")


def _ollama_host(host: str) -> str:
    """OLLAMA_HOST as Ollama reads it: the scheme may be missing, and the port; 0.0.0.0 is this machine."""
    scheme, mark, rest = host.partition("://")
    if not mark:
        scheme, rest = "http", host
    place, slash, path = rest.partition("/")
    if place.startswith(":"):
        place = f"127.0.0.1{place}"
    name, colon, port = place.rpartition(":")
    if not colon or place.endswith("]"):
        name, port = place, {"http": "80", "https": "443"}.get(scheme, "") if mark else "11434"
    name = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}.get(name, name)
    return f"{scheme}://{name}:{port}{slash}{path}"


def _make_client(entry: Entry, url: str, key: str, version: str, way: Any) -> Any:
    """An SDK client that never repeats a POST, and hands this server nothing of OpenAI's or Anthropic's."""
    http = _http_client(entry.api, way)
    return _surface(entry.api).connect(url=url, key=key, http_client=http, api_version=version)


def _http_client(api: str, way: Any) -> Any:
    import httpx2

    own = os.environ.get("ANTHROPIC_CUSTOM_HEADERS" if api == "messages" else "OPENAI_CUSTOM_HEADERS", "")
    foreign = {*_FOREIGN, *(line.partition(":")[0].strip().lower() for line in own.splitlines())} - {""}

    async def strip(request: Any) -> None:
        for name in foreign:
            if name in request.headers:
                del request.headers[name]

    hooks: dict[str, list[Any]] = {"request": [strip]}
    if way is not None:
        return httpx2.AsyncClient(transport=way, event_hooks=hooks)
    return httpx2.AsyncClient(
        event_hooks=hooks,
        timeout=600,
        follow_redirects=True,
        limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=100),
    )
