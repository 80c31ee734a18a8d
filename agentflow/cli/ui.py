"""``agentflow ui``: runs, steps and the approval inbox in a browser."""

from __future__ import annotations

import sys
from typing import Annotated

import orjson
import typer

from agentflow.cli import output
from agentflow.cli.journal import place


def ui(
    host: Annotated[str, typer.Option(help="The address to bind to.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="None: 8765, or the next one that is free. 0: any.")
    ] = None,
    open_: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open", help="Open it in the browser. None: where stdout is a terminal with a screen."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> None:
    """Show runs, steps, costs and the approval inbox on a local page, until Ctrl-C.

    The address that is printed holds a token, which is another one at each start; who has it can read the journal and
    decide. It is one process beside those that run workflows, and needs none of their code.
    """
    where = place()
    from agentflow.ui.serve import Server, browser, has_browser

    server = Server(where, host, port)
    if not server.is_local:
        output.words(
            f"Warning: {host} can be reached from other machines. Who has the address below can read everything in the "
            f"journal and decide, and what is sent is not encrypted. Safer: leave --host away, and on the other "
            f"machine: ssh -L {server.port}:127.0.0.1:{server.port} user@here"
        )
    output.words(f"ui · {where} · Ctrl-C ends it. Open:")
    wanted = sys.stdout.isatty() and not json and has_browser() if open_ is None else open_
    with browser(server.url, where) as show:

        def ready() -> None:
            # Not by output.data(), which would mask the token.
            data = orjson.dumps({"url": server.url, "port": server.port}).decode()
            print(data if json else server.url, flush=True)
            if wanted:
                show()

        server.run(ready)
