"""The command `eplb metrics`."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from .choice import fail, load

_LOOK = 0.05  # seconds: a ring of 256 steps goes round in one second with steps of 4 ms


def metrics(
    session: Annotated[
        str | None, typer.Option(help="Session of the engine (EPLB_SESSION).")
    ] = None,
    port: Annotated[int, typer.Option(help="TCP port; 0: any that is free.")] = 9475,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Serve a session's figures to Prometheus, from outside, until Ctrl-C or SIGTERM.

    It waits for an engine, and for the next one when that is gone.

    Example: eplb metrics --session a --port 9475
    """
    from prometheus_client import CollectorRegistry, start_http_server

    from ..ipc.limits import LimitError
    from ..ipc.rank_segment import warmup_reader
    from .logs import configure
    from .metrics import Exporter

    if not 0 <= port <= 65535:
        fail(f"--port is {port}; it must be from 0 to 65535")
    config = load(session=session)
    configure(config.log_level)
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    warmup_reader()
    exporter = Exporter(config.session, config.episode_steps, config.plan_interval)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(exporter)
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        fail(
            f"--host {host} --port {port} cannot be listened on: {error.strerror}; "
            "give another port, or an address of this machine"
        )
    typer.echo(
        f"figures of session {config.session!r} at http://{host}:{server.server_port}/metrics; "
        "end it with Ctrl-C"
    )
    try:
        while not told.wait(_LOOK):
            exporter.look()
    except LimitError as error:
        typer.echo(f"eplb: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        server.shutdown()
        exporter.close()
