"""Tap devices: persistent ones, made in the calling thread's namespace. Layouts: linux/if_tun.h."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from netslot.errors import HostError, KernelError

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_TUNSETGROUP = 0x400454CE
_TUNSETIFINDEX = 0x400454DA

_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000


def create_tap(
    name: str,
    *,
    index: int = 0,
    user: int | None = None,
    group: int | None = None,
    vnet_hdr: bool = True,
    multi_queue: bool = False,
) -> None:
    """Make a persistent tap that ``user``/``group`` (numeric ids) may open without CAP_NET_ADMIN.

    It stays when this process ends. KernelError EEXIST or EBUSY when the name or the index is taken;
    HostError when the machine has no /dev/net/tun.
    """
    fd = _open()
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_TUN_EXCL
        flags |= _IFF_VNET_HDR if vnet_hdr else 0
        flags |= _IFF_MULTI_QUEUE if multi_queue else 0
        if index:
            fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("=I", index))
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if user is not None:
            fcntl.ioctl(fd, _TUNSETOWNER, user)
        if group is not None:
            fcntl.ioctl(fd, _TUNSETGROUP, group)
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    except OSError as error:
        raise KernelError(f"make tap {name}", error.errno or errno.EIO) from error
    finally:
        os.close(fd)


def open_tap(name: str, *, vnet_hdr: bool = False, multi_queue: bool = False) -> int:
    """Attach to the tap ``name`` as a virtual machine monitor does; the caller closes the descriptor.

    ``vnet_hdr`` and ``multi_queue`` must be as the tap was made, or the kernel answers EINVAL.
    """
    fd = _open()
    flags = _IFF_TAP | _IFF_NO_PI
    flags |= _IFF_VNET_HDR if vnet_hdr else 0
    flags |= _IFF_MULTI_QUEUE if multi_queue else 0
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(fd)
        raise KernelError(f"open tap {name}", error.errno or errno.EIO) from error
    return fd


def _open() -> int:
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open /dev/net/tun: {error.strerror}", hint="modprobe tun") from error
