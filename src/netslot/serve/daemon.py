"""``netslot serve``: starts what there is to start, in order, and ends it without touching a slot."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import grp
import logging
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from aiohttp import web

from netslot.errors import NetslotError, RefusedError, UsageError
from netslot.host import building
from netslot.host.host import Host
from netslot.serve.answers import refusals
from netslot.serve.api import Api
from netslot.serve.client import socket_path
from netslot.serve.metrics import Metrics
from netslot.serve.notify import notify, watchdog_seconds
from netslot.serve.upkeep import Settings, Upkeep
from netslot.spec.load import load

log = logging.getLogger("netslot")

_SWITCH_SECONDS = 0.0005
_BACKLOG = 1024


def serve(host: Host, settings: Settings, *, group: str | None = None) -> None:
    """Serve ``host`` until SIGTERM or SIGINT. ``group`` may use the socket besides root.

    RefusedError when another daemon serves it already, or when there is no host and no spec to make one from.
    """
    _raise_file_limit()
    # Python hands its lock over after 5 ms by default: too long for an answer that waits for a recycle's thread.
    sys.setswitchinterval(_SWITCH_SECONDS)
    if not host.exists and settings.spec is None:
        raise RefusedError("there is no host here", hint="netslot serve SPEC makes one")
    host.engine.create()
    with host.engine.serving():
        if host.engine.ledger.get("spec"):
            building.adopt(host.engine)
        elif settings.spec is not None:
            building.up(host.engine, load(settings.spec), build=False)
        asyncio.run(_serve(host, settings, _group_id(group)))


async def _serve(host: Host, settings: Settings, group: int) -> None:
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    metrics = Metrics(host.engine)
    changed = asyncio.Event()
    upkeep = Upkeep(host.engine, metrics, settings, functools.partial(_set_from_thread, loop, changed))
    api = Api(host, upkeep, metrics, changed)
    runner = _runner(api)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    loop.add_signal_handler(signal.SIGHUP, functools.partial(_reload, upkeep))
    await runner.setup()
    path = socket_path(host.engine.state_dir)
    await web.SockSite(runner, _listen(path, group), backlog=_BACKLOG).start()
    upkeep.start(reload=settings.spec is not None)
    api.adopt_holders()
    watchdog = loop.create_task(_watchdog(api))
    notify("READY=1")
    log.info("serving on %s", path)
    await ending.wait()
    notify("STOPPING=1")
    watchdog.cancel()
    path.unlink(missing_ok=True)
    await runner.cleanup()
    await asyncio.to_thread(upkeep.stop)
    api.close()


def _set_from_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


def _runner(api: Api) -> web.AppRunner:
    app = web.Application(middlewares=[refusals], client_max_size=16 << 20)
    app.add_routes(api.routes())
    # A caller that goes away while it waits for a slot must not be given one.
    return web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=5)


def _reload(upkeep: Upkeep) -> None:
    notify("RELOADING=1")
    upkeep.reload()
    notify("READY=1")


async def _watchdog(api: Api) -> None:
    """Say that the daemon is well for as long as leases can be worked on."""
    seconds = watchdog_seconds()
    while seconds is not None:
        await api.do(lambda: None)
        notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 2)


def _listen(path: Path, group: int) -> socket.socket:
    """A listening socket that root and ``group`` may open; it takes the place of a dead daemon's at once."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    partial = path.with_name(f".{path.name}")
    try:
        partial.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            sock.bind(str(partial))
        finally:
            os.umask(before)
        if group >= 0:
            os.chown(partial, -1, group)
            os.chmod(partial, 0o660)
        sock.listen(_BACKLOG)
        partial.replace(path)
    except OSError as error:
        sock.close()
        raise NetslotError(f"cannot listen on {path}: {error.strerror or error}") from error
    return sock


def _group_id(name: str | None) -> int:
    if name is None:
        return -1
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise UsageError(f"there is no group {name!r}", hint="groupadd --system makes one") from error


def _raise_file_limit() -> None:
    """A descriptor is held for each connection and each process that a lease ends with."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # more than the kernel allows; what there is must do
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
