"""Who may ask: the right name of the host, the token of this start, the page itself. Everything else is refused.

Binding to loopback is not enough: a name that an attacker's server resolves to 127.0.0.1 ("DNS rebinding") makes a
stranger's page the same origin as this one, so the Host header has to be one of ours; and every page that a browser
shows may send requests to 127.0.0.1, so each needs the token, and each that changes something needs to come from the
page itself. The token is in the address that is printed; the page then has it in a cookie that no script and no other
site can use. https://jupyter-server.readthedocs.io/en/latest/operators/security.html is the model.
"""

from __future__ import annotations

import ipaddress
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 4_000_000  # of a request
HEADERS = {
    # Trusted types: in browsers that have them, not even the page's own scripts can turn text into HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether a name or address of this kind is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Lets requests through to ``app`` that may be asked, and sets the headers of all answers.

    Args:
        app: what answers.
        token: the secret of this start.
        names: names by which the server may be called, in small letters, besides addresses of loopback.
        anywhere: it is bound to more than loopback, and may be called by any address too: those cannot be rebound.
        cookie: the cookie's name.
    """

    def __init__(self, app: ASGIApp, *, token: str, names: frozenset[str], anywhere: bool, cookie: str) -> None:
        self.app = app
        self.cookie = cookie
        self._token = token.encode()
        self._names = names
        self._anywhere = anywhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"nothing here speaks {scope['type']}")
        request = Request(scope)
        new = self._equal(request.query_params.get("token")) if request.url.path == "/" else False
        refused = self._refused(request, new)

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if new and refused is None:
                    token = self._token.decode()
                    headers.append("Set-Cookie", f"{self.cookie}={token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        if refused is None:
            await self.app(scope, receive, headed)
        else:
            status, why = refused
            await PlainTextResponse(f"{why}\n", status)(scope, receive, headed)

    def _refused(self, request: Request, new: bool) -> tuple[int, str] | None:
        """Status and reason, or None."""
        host = request.headers.get("host", "")
        if not self._is_mine(host):
            return 421, "This server is not called so. Open the address that `agentflow ui` printed."
        if request.method not in ("GET", "HEAD", "POST"):
            return 405, "Only GET and POST are known here."
        site = request.headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none") and not new:
            return 403, "Another page asked for this."
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        by_header = scheme.lower() == "bearer" and self._equal(key)
        if not (new or by_header or self._equal(request.cookies.get(self.cookie))):
            return 403, "The token is missing or of an earlier start. Open the address that `agentflow ui` printed."
        if request.method != "POST":
            return None
        origin = request.headers.get("origin")
        if origin != f"http://{host}" and not (origin is None and by_header):
            return 403, "Another page sent this."
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "Content-Type has to be application/json."
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return 413, f"Content-Length has to be there, and at most {MOST_BYTES:,}."
        return None

    def _equal(self, given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), self._token)

    def _is_mine(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if is_loopback(name) or name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._anywhere
