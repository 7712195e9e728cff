"""Small rulesets in the shapes that well-known products write, with what an audit should see in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """``tenants``: what identifies each; ``classes``: how many kinds; ``owned``: rules of tenants, ``rules``: all."""

    text: str
    tenants: list[set[str]]
    classes: int


def _ruleset(*lines: str, table: str = "filter") -> str:
    chains = dict.fromkeys(line.split()[1] for line in lines if line.startswith("-A "))
    jumps = dict.fromkeys(
        words[index + 1]
        for line in lines
        for words in [line.split()]
        for index, word in enumerate(words)
        if word in ("-j", "-g") and words[index + 1].upper() != words[index + 1]
    )
    names = {**chains, **jumps}
    builtin = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
    declared = [f":{name} ACCEPT [0:0]" if name in builtin else f":{name} - [0:0]" for name in names]
    return "\n".join([f"*{table}", *declared, *lines, "COMMIT", ""])


def _neutron(port: str, address: str, mac: str) -> list[str]:
    tap, chain = f"tap{port}", port[:10]
    return [
        f"-A n-FORWARD -m physdev --physdev-out {tap} --physdev-is-bridged -j n-sg-chain",
        f"-A n-FORWARD -m physdev --physdev-in {tap} --physdev-is-bridged -j n-sg-chain",
        f"-A n-sg-chain -m physdev --physdev-out {tap} --physdev-is-bridged -j n-i{chain}",
        f"-A n-sg-chain -m physdev --physdev-in {tap} --physdev-is-bridged -j n-o{chain}",
        f"-A n-i{chain} -m state --state RELATED,ESTABLISHED -j RETURN",
        f"-A n-i{chain} -s 192.0.2.2/32 -p udp -m udp --sport 67 --dport 68 -j RETURN",
        f"-A n-i{chain} -j n-sg-fallback",
        f"-A n-o{chain} -j n-s{chain}",
        f"-A n-s{chain} -s {address}/32 -m mac --mac-source {mac} -j RETURN",
        f"-A n-s{chain} -j DROP",
    ]


NEUTRON = Shape(
    _ruleset(
        "-A FORWARD -j n-FORWARD",
        *_neutron("0695f2ca-bf", "192.0.2.12", "FA:16:3E:99:44:9E"),
        *_neutron("839737e6-15", "192.0.2.5", "FA:16:3E:80:E1:45"),
        "-A n-sg-chain -j ACCEPT",
        "-A n-sg-fallback -j DROP",
    ),
    [{"tap0695f2ca-bf", "192.0.2.12/32"}, {"tap839737e6-15", "192.0.2.5/32"}],
    1,
)


def _proxmox(link: str) -> list[str]:
    return [
        f"-A PVEFW-FWBR-IN -m physdev --physdev-out {link} --physdev-is-bridged -j {link}-IN",
        f"-A PVEFW-FWBR-OUT -m physdev --physdev-in {link} --physdev-is-bridged -j {link}-OUT",
        f"-A {link}-IN -p udp -m udp --sport 67 --dport 68 -j ACCEPT",
        f"-A {link}-OUT -m mac ! --mac-source 0e:0b:38:b8:b3:2{link[-1]} -j DROP",
    ]


PROXMOX = Shape(
    "*filter\n:FORWARD ACCEPT [0:0]\n:PVEFW-FWBR-IN - [0:0]\n:PVEFW-FWBR-OUT - [0:0]\n"
    + "".join(f":{link}-{way} - [0:0]\n" for link in ("tap100i0", "tap100i1", "veth200i0") for way in ("IN", "OUT"))
    + "-A FORWARD -m physdev --physdev-in fwln+ --physdev-is-bridged -j PVEFW-FWBR-IN\n"
    + "-A FORWARD -m physdev --physdev-out fwln+ --physdev-is-bridged -j PVEFW-FWBR-OUT\n"
    + "\n".join(line for link in ("tap100i0", "tap100i1", "veth200i0") for line in _proxmox(link))
    + "\nCOMMIT\n",
    [{"tap100i0", "tap100i1"}, {"veth200i0"}],
    2,
)


def _cloudstack(vm: str, link: str) -> list[str]:
    bridged = f"-m physdev --physdev-in {link} --physdev-is-bridged"
    return [
        f"-A b-in {bridged} -j {vm}-def",
        f"-A b-out -m physdev --physdev-out {link} --physdev-is-bridged -j {vm}-def",
        f"-A {vm}-def -m state --state RELATED,ESTABLISHED -j ACCEPT",
        f"-A {vm}-def {bridged} -m set ! --match-set {vm} src -j DROP",
        f"-A {vm}-def {bridged} -m set --match-set {vm} src -j {vm}-eg",
        f"-A {vm}-eg -j RETURN",
    ]


CLOUDSTACK = Shape(
    _ruleset(
        "-A FORWARD -i cloudbr0 -m physdev --physdev-is-bridged -j b-in",
        "-A FORWARD -o cloudbr0 -m physdev --physdev-is-bridged -j b-out",
        *_cloudstack("i-2-10", "vnet5"),
        *_cloudstack("i-2-11", "vnet6"),
    ),
    [{"vnet5"}, {"vnet6"}],
    1,
)


def _calico(link: str) -> list[str]:
    return [
        f"-A cali-from-wl -i {link} -g cali-fw-{link}",
        f"-A cali-to-wl -o {link} -g cali-tw-{link}",
        f"-A cali-fw-{link} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        f"-A cali-tw-{link} -m mark --mark 0x10000/0x10000 -j RETURN",
    ]


CALICO = Shape(
    _ruleset(
        "-A FORWARD -i cali+ -j cali-from-wl",
        "-A FORWARD -o cali+ -j cali-to-wl",
        *_calico("cali0a1b2c3d4e5"),
        *_calico("cali99887766554"),
        "-A cali-from-wl -j DROP",
    ),
    [{"cali0a1b2c3d4e5"}, {"cali99887766554"}],
    1,
)


def _kube_router(address: str, chain: str) -> list[str]:
    comment = f'-m comment --comment "rule to jump traffic from POD name:{chain} namespace: default to chain X"'
    return [
        f"-A kr-fwd -d {address}/32 {comment} -j {chain}",
        f"-A kr-fwd -s {address}/32 {comment} -j {chain}",
        f"-A {chain} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        f"-A {chain} -d {address}/32 -m addrtype --src-type LOCAL -j ACCEPT",
        f"-A {chain} -j kr-default",
    ]


KUBE_ROUTER = Shape(
    _ruleset(
        "-A FORWARD -j kr-fwd",
        *_kube_router("10.42.0.31", "pod-a"),
        *_kube_router("10.42.0.11", "pod-b"),
        "-A kr-default -j DROP",
    ),
    [{"10.42.0.31/32"}, {"10.42.0.11/32"}],
    1,
)

DOCKER = Shape(
    _ruleset(
        "-A FORWARD -o br-1a2b3c4d5e6f -j docker",
        "-A docker -d 172.18.0.2/32 ! -i br-1a2b3c4d5e6f -o br-1a2b3c4d5e6f -p tcp -m tcp --dport 80 -j ACCEPT",
        "-A docker -d 172.18.0.3/32 ! -i br-1a2b3c4d5e6f -o br-1a2b3c4d5e6f -p tcp -m tcp --dport 443 -j ACCEPT",
        "-A FORWARD -i br-1a2b3c4d5e6f ! -o br-1a2b3c4d5e6f -j ACCEPT",
        "-A INPUT -s 203.0.113.9/32 -p tcp -m tcp --dport 22 -j ACCEPT",
    ),
    [{"172.18.0.2/32"}, {"172.18.0.3/32"}],
    2,
)

CNI = Shape(
    _ruleset(
        '-A POSTROUTING -s 10.22.0.5/32 -m comment --comment "name: \\"net\\" id: \\"aaa\\"" -j cni-aaa',
        '-A POSTROUTING -s 10.22.0.6/32 -m comment --comment "name: \\"net\\" id: \\"bbb\\"" -j cni-bbb',
        "-A cni-aaa -d 10.22.0.0/16 -j ACCEPT",
        "-A cni-aaa ! -d 224.0.0.0/4 -j MASQUERADE",
        "-A cni-bbb -d 10.22.0.0/16 -j ACCEPT",
        "-A cni-bbb ! -d 224.0.0.0/4 -j MASQUERADE",
        table="nat",
    ),
    [{"10.22.0.5/32"}, {"10.22.0.6/32"}],
    1,
)

LIBVIRT = Shape(
    _ruleset(
        *(
            line
            for bridge, net in (("virbr0", "192.168.122.0/24"), ("virbr1", "192.168.123.0/24"))
            for line in (
                f"-A FORWARD -d {net} -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                f"-A FORWARD -s {net} -i {bridge} -j ACCEPT",
                f"-A FORWARD -i {bridge} -o {bridge} -j ACCEPT",
            )
        ),
        "-A OUTPUT -o virbr9 -p udp -m udp --dport 68 -j ACCEPT",
    ),
    [{"virbr0", "192.168.122.0/24"}, {"virbr1", "192.168.123.0/24"}],
    1,
)

FIRECRACKER = Shape(
    _ruleset(
        *(
            line
            for k in range(3)
            for line in (
                f"-A FORWARD -s 172.16.{k}.2/32 -i fc-tap{k} -o eth0 -j ACCEPT",
                f"-A FORWARD -i eth0 -o fc-tap{k} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                f"-A INPUT -d 172.16.{k}.1/32 -i fc-tap{k} -p udp -m udp --dport 53 -j ACCEPT",
            )
        ),
        "-A FORWARD -j DROP",
    ),
    [{f"fc-tap{k}", f"172.16.{k}.2/32"} for k in range(3)],
    1,
)

FLAT = Shape(
    _ruleset(
        *(
            line
            for k in range(4)
            for line in (
                f"-A FORWARD -s 10.5.0.{k + 2}/32 -p tcp -m tcp --dport 443 -j ACCEPT",
                f"-A FORWARD -d 10.5.0.{k + 2}/32 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            )
        ),
        "-A INPUT -s 10.9.0.1/32 -p tcp -m tcp --dport 22 -j ACCEPT",
        "-A INPUT -s 10.9.0.2/32 -p tcp -m tcp --dport 22 -j ACCEPT",
        "-A INPUT -s 10.9.0.3/32 -p tcp -m tcp --dport 22 -j ACCEPT",
    ),
    [{f"10.5.0.{k + 2}/32"} for k in range(4)],
    1,
)

NOBODY = Shape(
    _ruleset(
        "-A INPUT -i lo -j ACCEPT",
        "-A INPUT -s 203.0.113.7/32 -p tcp -m tcp --dport 22 -j ACCEPT",
        "-A OUTPUT -d 203.0.113.7/32 -j ACCEPT",
        "-A FORWARD -i docker0 -j ACCEPT",
        "-A INPUT -i eth0 -j DROP",
    ),
    [],
    0,
)

KUBE_PROXY = Shape(
    "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SVC-A - [0:0]\n"
    ":KUBE-SEP-A - [0:0]\n:KUBE-SEP-B - [0:0]\n"
    "-A PREROUTING -j KUBE-SERVICES\n"
    "-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m udp --dport 53 -j KUBE-SVC-A\n"
    "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n"
    "-A KUBE-SVC-A -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A\n"
    "-A KUBE-SVC-A -j KUBE-SEP-B\n"
    "-A KUBE-SEP-A -s 10.244.2.2/32 -j KUBE-MARK-MASQ\n"
    "-A KUBE-SEP-A -p udp -m udp -j DNAT --to-destination 10.244.2.2:53\n"
    "-A KUBE-SEP-B -s 10.244.2.3/32 -j KUBE-MARK-MASQ\n"
    "-A KUBE-SEP-B -p udp -m udp -j DNAT --to-destination 10.244.2.3:53\n"
    "COMMIT\n",
    [],
    0,
)
"""Endpoints of services can be anywhere in a cluster: they are no tenants of this host."""

ALL = {name.lower(): shape for name, shape in list(globals().items()) if isinstance(shape, Shape)}
