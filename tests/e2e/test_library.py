"""The library inside somebody else's program: with threads, with asyncio, and without moving any thread of theirs."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import host_lab
from netslot.host.host import Host

OURS = "netslot-"
"""How the names of netslot's own threads begin, the only ones that may be elsewhere."""


def namespace(thread: int) -> str:
    return os.readlink(f"/proc/self/task/{thread}/ns/net")


@contextmanager
def no_thread_is_moved() -> Iterator[None]:
    """Look again and again at the namespaces of all threads but netslot's own."""
    home = os.readlink("/proc/thread-self/ns/net")
    moved: list[str] = []
    looks = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal looks
        while not done.is_set():
            for thread in threading.enumerate():
                if thread.name.startswith(OURS) or thread.native_id is None:
                    continue
                try:
                    place = namespace(thread.native_id)
                except OSError:  # it ended meanwhile
                    continue
                looks += 1
                if place != home:
                    moved.append(thread.name)

    watcher = threading.Thread(target=watch, name="watcher")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert looks > 10
    assert not moved, f"moved out of their namespace: {set(moved)}"


def tenant(host: Host, name: str) -> int:
    """What a platform does with a tenant, from start to end; returns the slot it had."""
    home = os.readlink("/proc/thread-self/ns/net")
    with host.acquire(name, wait=20) as lease:
        assert os.readlink("/proc/thread-self/ns/net") == home
        assert host.show(lease.slot)["owner"] == name
        assert host.execute(lease.slot, ["true"]) == 0
        assert host.verify(slots=[lease.slot]).drift == []
    assert os.readlink("/proc/thread-self/ns/net") == home
    return lease.slot


def test_threads_of_one_program_share_a_host(tmp_path: Path) -> None:
    with host_lab.scene("process/netslot.toml", tmp_path) as scene, no_thread_is_moved():
        scene.up(3)
        with ThreadPoolExecutor(4) as pool:
            slots = list(pool.map(lambda number: tenant(scene.host, f"tenant-{number}"), range(12)))
        assert set(slots) <= {1, 2, 3}
        assert scene.host.status().free == 3
        assert scene.host.verify().drift == []


def test_an_asyncio_program(tmp_path: Path) -> None:
    async def serve(host: Host) -> list[int]:
        return await asyncio.gather(*(asyncio.to_thread(tenant, host, f"tenant-{number}") for number in range(6)))

    with host_lab.scene("process/netslot.toml", tmp_path) as scene, no_thread_is_moved():
        scene.up(2)
        slots = asyncio.run(serve(scene.host))
        assert set(slots) <= {1, 2}
        assert scene.host.status().free == 2
