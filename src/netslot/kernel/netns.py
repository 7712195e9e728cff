"""Network namespaces: make, pin by name, open, enter for the length of a call, remove.

A *pin* is a bind mount of the namespace on a file in ``/run/netns``, which is what ``ip netns`` knows.
Only threads of a :class:`Worker` ever leave the process's own namespace, so no caller's thread is moved.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from netslot.errors import KernelError
from netslot.kernel import sys

P = ParamSpec("P")
T = TypeVar("T")

NETNS_DIR = Path("/run/netns")
"""Where ``ip netns`` keeps its names (iproute2: NETNS_RUN_DIR)."""

_NS_GET_NSTYPE = 0xB703  # _IO(0xb7, 0x3), linux/nsfs.h


def own_path() -> str:
    """The /proc path of the calling thread's network namespace."""
    return f"/proc/self/task/{threading.get_native_id()}/ns/net"


def open_own() -> int:
    """Open the calling thread's network namespace; the caller closes the descriptor."""
    return os.open(own_path(), os.O_RDONLY | os.O_CLOEXEC)


def open_path(path: str | Path) -> int:
    """Open a namespace file; the caller closes the descriptor.

    Raises KernelError: ENOENT when there is no such file, EINVAL when it pins no network namespace.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open {path}", error.errno or errno.EIO) from error
    if not is_namespace(fd):
        os.close(fd)
        raise KernelError(f"open {path}", errno.EINVAL, detail="the file is there but pins no network namespace")
    return fd


def open_named(name: str) -> int:
    """Open the namespace that ``ip netns`` knows as ``name``; errors as :func:`open_path`."""
    return open_path(NETNS_DIR / name)


def is_namespace(fd: int) -> bool:
    """True when ``fd`` refers to a network namespace (ioctl_ns(2), NS_GET_NSTYPE)."""
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == sys.CLONE_NEWNET
    except OSError:
        return False


def inode(fd: int) -> int:
    """The inode number that identifies the namespace while it lives."""
    return os.fstat(fd).st_ino


def names() -> list[str]:
    """The file names in ``/run/netns``: what ``ip netns list`` prints, pinned or left over."""
    try:
        return os.listdir(NETNS_DIR)
    except FileNotFoundError:
        return []


def pin(name: str, fd: int | None = None) -> None:
    """Bind a namespace (default: the calling thread's) to ``name``; EEXIST when the name is taken."""
    path = NETNS_DIR / name
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except FileNotFoundError:
        NETNS_DIR.mkdir(parents=True, exist_ok=True)
        return pin(name, fd)
    except OSError as error:
        raise KernelError(f"create {path}", error.errno or errno.EIO) from error
    source = own_path() if fd is None else f"/proc/self/fd/{fd}"
    sys.mount(source, str(path), "none", sys.MS_BIND)
    return None


def unpin(name: str) -> bool:
    """Remove the pin ``name``; absence is success. Returns whether there was anything to remove.

    The namespace itself goes when its last user does: the kernel cleans up in the background.
    """
    path = str(NETNS_DIR / name)
    try:
        sys.umount(path, sys.MNT_DETACH)
    except KernelError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # not a mount point, or no such file
            raise
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def entered(fd: int) -> Iterator[None]:
    """Move the calling :class:`Worker` thread into ``fd`` for the length of the block.

    Raises RuntimeError on a thread that is not a worker's: another user of that thread could be moved with it.
    """
    home = getattr(_local, "home", None)
    if home is None:
        raise RuntimeError("a namespace may be entered only on a netns.Worker thread")
    sys.setns(fd, sys.CLONE_NEWNET)
    try:
        yield
    finally:
        _local.home_lost = True
        sys.setns(home, sys.CLONE_NEWNET)
        _local.home_lost = False


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Move the calling :class:`Worker` thread into a new namespace for the length of the block.

    The namespace dies with the block unless it was pinned, opened, or something was started in it.
    """
    home = getattr(_local, "home", None)
    if home is None:
        raise RuntimeError("a namespace may be entered only on a netns.Worker thread")
    sys.unshare(sys.CLONE_NEWNET)
    try:
        yield
    finally:
        _local.home_lost = True
        sys.setns(home, sys.CLONE_NEWNET)
        _local.home_lost = False


_local = threading.local()


class Worker:
    """A thread of netslot's own that may enter namespaces; calls are served in order.

    ``home`` is the namespace the thread starts in and returns to between calls (default: the caller's).
    A thread that cannot get home is thrown away and replaced.
    """

    def __init__(self, home: int | None = None, name: str = "netslot-worker") -> None:
        self._home = os.dup(home) if home is not None else open_own()
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call; exceptions arrive through the future."""
        future: Future[T] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
        self._jobs.put((future, lambda: function(*args, **kwargs)))
        return future

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` on the worker's thread and wait for its result.

        From the worker's own thread the call is made directly.
        """
        if threading.current_thread() is self._thread:
            return function(*args, **kwargs)
        return self.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        """Let queued calls finish, then end the thread. The worker cannot be used afterwards."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        _local.home = self._home
        try:
            sys.setns(self._home, sys.CLONE_NEWNET)
        except KernelError as error:  # no CAP_SYS_ADMIN: the first call hears of it, the next starts a new thread
            job = self._jobs.get()
            with self._lock:
                self._thread = None
            if job is not None:
                job[0].set_exception(error)
            return
        while (job := self._jobs.get()) is not None:
            future, call = job
            _local.home_lost = False
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, call, future
            if _local.home_lost:
                with self._lock:
                    self._thread = None  # the next submit starts a fresh thread
                return


def run_in(fd: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` in namespace ``fd`` on a thread made for this one call."""
    with Worker(fd) as worker:
        return worker.run(function, *args, **kwargs)


def create(name: str) -> None:
    """Make a namespace and pin it as ``name``, without moving the caller (as ``ip netns add`` does)."""

    def make() -> None:
        sys.unshare(sys.CLONE_NEWNET)
        pin(name)

    with Worker() as worker:
        worker.run(make)
