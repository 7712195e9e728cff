"""What an interface name says about the interface, by the names that hypervisors and container engines give."""

from __future__ import annotations

import re
from enum import Enum


class Kind(Enum):
    GUEST = "guest"
    BRIDGE = "bridge"
    HOST = "host"
    UNKNOWN = "unknown"


_GUEST = re.compile(
    r"tap.+|[\w-]*tap[-_.]?\d+|macvtap\d+|vnet\d+|veth.+|vif[1-9]\d*\.\d+|cali[0-9a-f]+|lxc[0-9a-f_]+|qv[bo].+"
    r"|fw(?:ln|pr)\d+[ip]\d+|fc.*\d+|v[be]-.+|azv[0-9a-f]+|eni[0-9a-f]{11}|slot\d+.*|vm[-_]?\d+|ns[-_]?\d+"
    r"|one-\d+-\d+"
)
"""qemu/libvirt/Firecracker taps, Xen vifs (domain 0 is the host), Calico, LXC/Cilium, Neutron's veth halves,
Proxmox's firewall links, systemd-nspawn, Azure and AWS CNI, OpenNebula's cards."""

_BRIDGE = re.compile(
    r"br\d.*|br[-_].+|br[a-z]{1,4}\d+.*|virbr\d+|docker\d+|docker_gwbridge|podman\d+|cni\d+|cni-podman\d+|cbr\d+"
    r"|lxdbr\d+|lxcbr\d+|incusbr\d+|vmbr\d+.*|[bq]r[a-z]?[0-9a-f-]{8,}|fwbr\d+[iv]\d+|kube-bridge|cloudbr\d+"
    r"|xapi\d+|xenbr\d+|nerdctl\d+"
)

_HOST = re.compile(
    r"lo|eth\d+.*|en[opsx]\w*|em\d+|p\d+p\d+.*|bond\d+.*|team\d+.*|wl\w+|ppp\d+|tun\d+|wg\d*.*|wt\d+|tailscale\d+"
    r"|lan\d+|wan\d*|vethwe-\w+|flannel[.\d]*|vxlan[.\w]*|geneve.*|tunl0|kube-ipvs0|nodelocaldns|cilium_\w+|ib\d+|vif0\.\d+|zt\w+|dummy\d*"
)

IDLE_BRIDGES = frozenset(("docker0", "cni0", "podman0"))
"""Bridges that an engine makes for itself, whether or not anything is connected to them."""


def kind(name: str) -> Kind:
    """Host names win (``vif0.0``), then bridges, then guests."""
    if _HOST.fullmatch(name):
        return Kind.HOST
    if _BRIDGE.fullmatch(name):
        return Kind.BRIDGE
    return Kind.GUEST if _GUEST.fullmatch(name) else Kind.UNKNOWN


_CARDS = re.compile(r"(?:tap|veth|fwln|fwpr|fwbr)(\d+)[ip]\d+|(one-\d+)-\d+")  # Proxmox, OpenNebula
_NEUTRON = re.compile(r"(?:tap|qvb|qvo|qbr)([0-9a-f]{8}-[0-9a-f]{2})")
_NUMBERS = re.compile(r"\d+")
_FAMILY = re.compile(r"(.*?)[-_.]?(?:\d+|[0-9a-f]{6,})")
_HASHES = re.compile(r"(?<![0-9a-z])[0-9a-f]{6,}(?![0-9a-z])")
_BENEATH = re.compile(r"[^-_.]+(?=[-_.])")
_DIALLED = re.compile(r"ppp\d+")


def guest_of(name: str) -> str:
    """One word for all interfaces of one guest, where the product's naming says so; else ''."""
    found = _CARDS.fullmatch(name)
    if found:
        return f"guest {found[1] or found[2]}"
    found = _NEUTRON.fullmatch(name)
    return f"port {found[1]}" if found else ""


def family_of(name: str) -> str:
    """The stem of a numbered or hashed name (``vmnic12`` -> ``vmnic``, ``g7-e0`` -> ``g#-e``, ``sb1-eth`` ->
    ``sb#-eth``), or nothing."""
    found = _FAMILY.fullmatch(name)
    if found:
        return _NUMBERS.sub("#", found[1])
    stem = _NUMBERS.sub("#", _HASHES.sub("#", name))
    return stem if "#" in stem and not stem.startswith("#") else ""


def may_be_guests(name: str) -> bool:
    """Whether there can be one such link for each guest, as a dial-in server has for its subscribers."""
    if _DIALLED.fullmatch(name):
        return True
    beneath = _BENEATH.match(name)  # of eth0.100 or virbr0-nic the host's link that it belongs to
    return kind(name) is Kind.UNKNOWN and (not beneath or kind(beneath[0]) not in (Kind.HOST, Kind.BRIDGE))
