"""The variables that rule files and texts of the spec may use, named the same in all formats.

``docs/reference/variables.md`` is made from these tables (:mod:`netslot.spec.reference`).
"""

from __future__ import annotations

from typing import Final

HOST: Final = {
    "prefix": "What the names of all slots' namespaces and of root's ends of their links begin with: `slot`.",
    "host_uplink": "Root's interface to the outside: `eth0`.",
    "pool": "The IPv4 network that holds every slot's address: `10.201.0.0/16`.",
    "pool6": "The IPv6 network of the slots; only with `addresses.pool6`.",
    "dns": "The IPv4 resolvers of `addresses.dns`, with commas; only where there are any.",
    "dns6": "The IPv6 resolvers of `addresses.dns`, with commas; only where there are any.",
}
"""The same for the whole host. Root's rule files may use these and no others."""

SLOT: Final = {
    "slot": "The slot's number: `17`.",
    "class": "The slot's class: `default` where the spec has no classes.",
    "netns": "The slot's namespace, as `ip netns` knows it: `slot17`.",
    "address": "The slot's own IPv4 address, by which root and the outside know it: `10.201.0.35`.",
    "root_address": "Root's end of the link to the slot, and the slot's default gateway: `10.201.0.34`.",
    "prefix_length": "The prefix length on that link: `31`.",
    "address6": "The slot's own IPv6 address; only with `addresses.pool6`.",
    "root_address6": "Root's IPv6 address on the link to the slot; only with `addresses.pool6`.",
    "prefix_length6": "The IPv6 prefix length on that link: `127`; only with `addresses.pool6`.",
    "network6": "The slot's own IPv6 prefix, a /64 or a /127; only with `addresses.pool6`.",
    "uplink_if": "The slot's interface to root: `up0`.",
    "uplink_mac": "The MAC of that interface.",
    "root_if": "Root's end of the link: `slot17`. No rule inside the slot can match it.",
    "root_mac": "The MAC of root's end.",
    "mtu": "The MTU of all links of the slot, in bytes.",
    "cgroup": "The slot's cgroup below the root of the hierarchy; only with `[cgroup]`.",
}
"""One slot's own, whatever its attachment."""

GUEST: Final = {
    "guest_if": "The slot's interface to the workload: `tap0`.",
    "guest_address": "The workload's IPv4 address, the same in every slot: `172.16.0.2`.",
    "guest_network": "The network of that link: `172.16.0.0/30`.",
    "guest_prefix_length": "Its prefix length: `30`.",
    "gateway": "The slot's IPv4 address towards the workload: `172.16.0.1`.",
    "guest_address6": "The workload's IPv6 address; only with `addresses.pool6`.",
    "guest_network6": "The IPv6 network of that link; only with `addresses.pool6`.",
    "guest_prefix_length6": "Its prefix length; only with `addresses.pool6`.",
    "gateway6": "The slot's IPv6 address towards the workload; only with `addresses.pool6`.",
    "guest_mac": "The workload's MAC, the same in every slot.",
    "gateway_mac": "The slot's MAC towards the workload, the same in every slot.",
}
"""Of slots whose workload is behind a link of its own: attachments tap and veth."""

RESIDENT: Final = {
    "tenant": "What the tenant is called.",
    "address_2": "The tenant's second IPv4 address, and so on; of IPv6 `address6_2`.",
    "gateway_2": "The second address of root that the tenant knows as its gateway; of IPv6 `gateway6_2`.",
}
"""Of slots in a roster."""

ALL: Final = HOST | SLOT | GUEST | RESIDENT
