"""IP sets over nfnetlink: create, fill, swap, list, destroy, in the calling thread's namespace.

Layouts: linux/netfilter/ipset/ip_set.h, protocol 7 (Linux 4.20). Only ``hash:net`` is made here; sets of any kind
are listed and destroyed. Rules refer to a set by its *index*; a swap exchanges contents and leaves the indexes.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from netslot.errors import KernelError, UsageError
from netslot.kernel import netlink
from netslot.kernel.netlink import Request

NAME_LIMIT: Final = 31
"""Longest name of a set, in bytes (IPSET_MAXNAMELEN less the NUL)."""

TYPE: Final = "hash:net"
"""The type of the sets that :func:`create` makes."""

FAMILY_IPV4: Final = socket.AF_INET
FAMILY_IPV6: Final = socket.AF_INET6

_ADDRESS_SIZE: Final[dict[int, int]] = {FAMILY_IPV4: 4, FAMILY_IPV6: 16}
_SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET
_CREATE, _DESTROY, _FLUSH, _SWAP, _LIST, _ADD = 2, 3, 4, 6, 7, 9

_A_PROTOCOL, _A_SETNAME, _A_TYPENAME, _A_REVISION, _A_FAMILY, _A_FLAGS, _A_DATA, _A_ADT, _A_LINENO = range(1, 10)
_A_SETNAME2 = _A_TYPENAME
_D_IP, _D_CIDR = 1, 3
_D_HASHSIZE, _D_MAXELEM, _D_ELEMENTS = 18, 19, 24
_IP_V4, _IP_V6 = 1, 2
_NET_BYTEORDER = 0x4000

_FLAG_LIST_SETNAME = 1 << 1
_FLAG_LIST_HEADER = 1 << 2

_PROTOCOL = 7
_HEADER = netlink.attr_u8(_A_PROTOCOL, _PROTOCOL)
_SO_IP_SET = 83
_OP_GET_BYINDEX = 7
_BY_INDEX = struct.Struct("=IIH30x")  # struct ip_set_req_get_set
_ATTR = struct.Struct("=HH")
_ADT_LIMIT = 65_000  # an attribute's length is 16 bits wide
_BUCKET = 4  # elements a hash bucket may grow to before the table does; AHASH_INIT_SIZE is 2, the default maximum 12

_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt
_getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

_ERRORS: Final = {
    4097: "this kernel speaks another protocol",
    4098: "this kernel has no such set type",
    4099: "no room for another set",
    4100: "the set is in use by a rule",
    4101: "the second set does not exist or a set of that name does",
    4102: "the sets are of different types",
    4103: "the element is in the set already, or is not",
    4104: "invalid prefix length",
    4106: "wrong address family",
    4352: "the set is full",
}


class Header(NamedTuple):
    """A set without its elements."""

    name: str
    type: str
    family: int
    elements: int


def create(name: str, family: int, capacity: int) -> Request:
    """Make an empty ``hash:net`` set that can hold ``capacity`` elements; EEXIST when the name is taken."""
    data = netlink.nested(
        _A_DATA,
        netlink.attr_be32(_D_HASHSIZE | _NET_BYTEORDER, _hash_size(capacity)),
        netlink.attr_be32(_D_MAXELEM | _NET_BYTEORDER, max(capacity, 65_536)),
    )
    return _request(
        _CREATE,
        family,
        netlink.attr_str(_A_SETNAME, name)
        + netlink.attr_str(_A_TYPENAME, TYPE)
        + netlink.attr_u8(_A_REVISION, 0)
        + netlink.attr_u8(_A_FAMILY, family)
        + data,
        f"ipset create {name}",
        flags=netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
    )


def destroy(name: str, *, missing_ok: bool = False) -> Request:
    """Remove a set. The kernel answers 4100 (busy) while a rule refers to it."""
    ignore = (2,) if missing_ok else ()
    return _request(_DESTROY, 0, netlink.attr_str(_A_SETNAME, name), f"ipset destroy {name}", ignore=ignore)


def flush(name: str) -> Request:
    """Empty a set."""
    return _request(_FLUSH, 0, netlink.attr_str(_A_SETNAME, name), f"ipset flush {name}")


def swap(name: str, other: str) -> Request:
    """Exchange the contents of two sets of one type and family; rules see one or the other, never neither."""
    names = netlink.attr_str(_A_SETNAME, name) + netlink.attr_str(_A_SETNAME2, other)
    return _request(_SWAP, 0, names, f"ipset swap {name} {other}")


def add(name: str, family: int, elements: Sequence[bytes]) -> list[Request]:
    """Put elements, as :func:`element` makes them, into a set; those that are in it already do no harm."""
    if not elements:
        return []
    step = _ADT_LIMIT // len(elements[0])
    requests = []
    for start in range(0, len(elements), step):
        content = b"".join(elements[start : start + step])
        payload = (
            netlink.attr_str(_A_SETNAME, name)
            + netlink.attr(_A_ADT | netlink.NLA_F_NESTED, content)
            + netlink.attr_u32(_A_LINENO, 0)
        )
        requests.append(_request(_ADD, family, payload, f"ipset add {name}"))
    return requests


def element_form(family: int, length: int) -> tuple[bytes, bytes]:
    """What stands before and behind the address in a ``hash:net`` element of that length, as :func:`add` takes it."""
    before, behind = _content_form(family, length, _NET_BYTEORDER)
    size = 4 + len(before) + _ADDRESS_SIZE[family] + len(behind)
    return _ATTR.pack(size, _A_DATA | netlink.NLA_F_NESTED) + before, behind


def listed_form(family: int, length: int) -> tuple[bytes, bytes]:
    """The same, as :func:`elements` gives: without a header, and without the byte order being told."""
    return _content_form(family, length, 0)


def _content_form(family: int, length: int, flag: int) -> tuple[bytes, bytes]:
    size, kind = _ADDRESS_SIZE[family], _IP_V4 if family == FAMILY_IPV4 else _IP_V6
    address = _ATTR.pack(4 + size, kind | flag)
    return _ATTR.pack(8 + size, _D_IP | netlink.NLA_F_NESTED) + address, netlink.attr_u8(_D_CIDR, length)


def execute(socket_: netlink.Socket, requests: Iterable[Request]) -> None:
    """Carry the requests out in order, a few datagrams for many; what follows a failed one is not tried."""
    group: list[Request] = []
    size = 0
    for request in requests:
        if group and size + len(request.payload) > _ADT_LIMIT:
            _execute(socket_, group)
            group, size = [], 0
        group.append(request)
        size += len(request.payload)
    _execute(socket_, group)


def name_at(sock: socket.socket, index: int) -> str:
    """The name of the set that rules know as ``index``, empty when there is none; ``sock`` is any IPv4 socket.

    A new set takes the lowest free index (ip_set_create), so the one behind the known sets gives away any other.
    """
    buffer = bytearray(_BY_INDEX.size)
    _BY_INDEX.pack_into(buffer, 0, _OP_GET_BYINDEX, _PROTOCOL, index)
    length = ctypes.c_uint(len(buffer))
    data = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    if _getsockopt(sock.fileno(), socket.SOL_IP, _SO_IP_SET, data, ctypes.byref(length)) == -1:
        raise KernelError("ipset look up", ctypes.get_errno())
    return buffer[8:].split(b"\0", 1)[0].decode(errors="replace")


def names(socket_: netlink.Socket) -> list[str]:
    """All sets of the namespace, in the order of their indexes."""
    answers = _dump(socket_, netlink.attr_be32(_A_FLAGS | _NET_BYTEORDER, _FLAG_LIST_SETNAME))
    return [_name(netlink.parse_attrs(answer, 4)) for answer in answers]


def headers(socket_: netlink.Socket) -> list[Header]:
    """All sets of the namespace with their types and numbers of elements, in the order of their indexes."""
    found = []
    for answer in _dump(socket_, netlink.attr_be32(_A_FLAGS | _NET_BYTEORDER, _FLAG_LIST_HEADER)):
        attributes = netlink.parse_attrs(answer, 4)
        data = netlink.parse_attrs(attributes.get(_A_DATA, b""))
        elements = struct.unpack(">I", data[_D_ELEMENTS])[0] if _D_ELEMENTS in data else 0
        kind = attributes[_A_TYPENAME].rstrip(b"\0").decode()
        found.append(Header(_name(attributes), kind, attributes[_A_FAMILY][0], elements))
    return found


def elements(socket_: netlink.Socket, name: str) -> list[bytes]:
    """Everything in a set, each element as the attributes that the kernel gives for it, in no order."""
    found: list[bytes] = []
    for answer in _dump(socket_, netlink.attr_str(_A_SETNAME, name)):
        content = netlink.parse_attrs(answer, 4).get(_A_ADT, b"")
        found += _equal_attributes(content) or (value for _, value in netlink.iter_attrs(content))
    return found


def _equal_attributes(content: bytes) -> list[bytes]:
    """The values of attributes that all have the same header, several times faster than one by one; else []."""
    if not content:
        return []
    step = (_ATTR.unpack_from(content)[0] + 3) & ~3
    count, rest = divmod(len(content), step)
    if rest or any(content[at::step] != content[at : at + 1] * count for at in range(4)):
        return []
    return [content[start + 4 : start + step] for start in range(0, len(content), step)]


def _request(
    command: int, family: int, payload: bytes, operation: str, *, flags: int = 0, ignore: tuple[int, ...] = ()
) -> Request:
    return Request(
        _SUBSYSTEM | command, flags, struct.pack("=BBH", family, 0, 0) + _HEADER + payload, operation, ignore
    )


def _execute(socket_: netlink.Socket, group: list[Request]) -> None:
    try:
        socket_.execute(group)
    except KernelError as error:
        raise _explained(error) from error


def _dump(socket_: netlink.Socket, payload: bytes) -> list[bytes]:
    header = struct.pack("=BBH", 0, 0, 0) + _HEADER
    try:
        return [answer.payload for answer in socket_.dump(_SUBSYSTEM | _LIST, header + payload, "ipset list")]
    except KernelError as error:
        raise _explained(error) from error


def _name(attributes: dict[int, bytes]) -> str:
    return attributes[_A_SETNAME].rstrip(b"\0").decode()


def _hash_size(capacity: int) -> int:
    """Buckets for ``capacity`` elements: growing a set by half-full doublings costs more than filling it."""
    return max(64, 1 << max(0, capacity // _BUCKET - 1).bit_length())


def _explained(error: KernelError) -> KernelError:
    return KernelError(error.operation, error.errno, detail=error.detail or _ERRORS.get(error.errno), hint=error.hint)


def check_name(name: str) -> str:
    """Return ``name``; UsageError when the kernel would not take it for a set."""
    if not 0 < len(name.encode()) <= NAME_LIMIT:
        raise UsageError(f"a set's name has 1 to {NAME_LIMIT} bytes: {name!r}")
    return name
