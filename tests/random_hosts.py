"""Rulesets of small hosts made of many shapes of rules, for property tests of the splitter and the prover."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

OUTSIDE = "eth0"

_OUTWARD = (
    "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-p tcp -m tcp --dport 25 -j REJECT --reject-with icmp-port-unreachable",
    "-p tcp -m tcp --dport 1000:1100 -j ACCEPT",
    "-p udp -m multiport --dports 53,123 -j ACCEPT",
    "-d 203.0.113.0/25 -j DROP",
    "-d 203.0.113.128/26 -p tcp -j ACCEPT",
    "! -d 192.0.2.0/24 -p icmp -j ACCEPT",
    "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m tcp --dport 443 -j ACCEPT",
    f"-o {OUTSIDE} -j ACCEPT",
    "-m iprange --dst-range 203.0.113.10-203.0.113.20 -j REJECT --reject-with icmp-host-prohibited",
    "-j DROP",
)
_INWARD = (
    "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-p tcp -m tcp --dport 8080 -m conntrack --ctstate NEW -j ACCEPT",
    "-p icmp -m icmp --icmp-type 8 -j ACCEPT",
    "-s 203.0.113.0/24 -p udp -j DROP",
    "-p udp -m udp ! --dport 53 -j REJECT --reject-with icmp-port-unreachable",
    "-j DROP",
)
_COMMON_FORWARD = (
    "-m conntrack --ctstate INVALID -j DROP",
    "-d 192.0.2.9/32 -j DROP",
    "-d 192.0.2.0/24 -i tap+ -p tcp -j ACCEPT",
    "-p tcp -m tcp --dport 23 -j DROP",
    "-s 203.0.113.7/32 -j ACCEPT",
    "-p udp -m udp --dport 4000:5000 -j ACCEPT",
)
_HOST = (
    "-i {tap} -d {gateway} -p udp -m udp --dport 53 -j ACCEPT",
    "-i {tap} -p icmp -j ACCEPT",
    "-i {tap} -j DROP",
)


def _rules(shapes: Sequence[str], most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(shapes), min_size=1, max_size=most, unique=True)


@st.composite
def hosts(draw: st.DrawFn, publishing: bool = False) -> str:
    """iptables-save form: four tenants of two classes, tap0 to tap3, each with a /30 of 10.64.0.0/24.

    With ``publishing`` some of them have a port of the host's, and most hosts keep tenants apart before all else.
    """
    classes = [(draw(_rules(_OUTWARD, 5)), draw(_rules(_INWARD, 4)), draw(_rules(_HOST, 3))) for _ in range(2)]
    before, after = draw(_rules(_COMMON_FORWARD, 3)), draw(_rules(_COMMON_FORWARD, 2))
    policy, chained = draw(st.sampled_from(("ACCEPT", "DROP"))), draw(st.booleans())
    published = draw(st.lists(st.sampled_from(range(4)), unique=True, max_size=3)) if publishing else []
    if publishing and draw(st.integers(0, 3)):
        before.insert(0, "-i tap+ -o tap+ -j DROP")
    forward, inputs, spoof, nat = [*before], [], [], []
    chains: dict[str, list[str]] = {}
    for number in range(4):
        tap, ip, gateway = f"tap{number}", f"10.64.0.{4 * number + 2}/32", f"10.64.0.{4 * number + 1}/32"
        outward, inward, host = classes[number % 2]
        spoof.append(f"PREROUTING ! -s {ip} -i {tap} -j DROP")
        nat.append(f"POSTROUTING -s {ip} -o {OUTSIDE} -j MASQUERADE")
        if number in published:
            port = f"-i {OUTSIDE} -p tcp -m tcp --dport {30000 + number}"
            nat.insert(0, f"PREROUTING {port} -j DNAT --to-destination {ip[:-3]}:8080")
        inputs += [shape.format(tap=tap, gateway=gateway) for shape in host]
        if chained and number % 2:
            chains[f"{tap}-out"], chains[f"{tap}-in"] = outward, inward
            forward += [f"-i {tap} -j {tap}-out", f"-o {tap} -j {tap}-in"]
        else:
            forward += [_with(f"-i {tap} -s {ip}", rule) for rule in outward]
            forward += [_with(f"-o {tap} -d {ip}", rule) for rule in inward]
    forward += after
    lines = ["*raw", ":PREROUTING ACCEPT [0:0]", *(f"-A {rule}" for rule in spoof), "COMMIT"]
    lines += [
        "*nat",
        ":PREROUTING ACCEPT [0:0]",
        ":POSTROUTING ACCEPT [0:0]",
        *(f"-A {rule}" for rule in nat),
        "COMMIT",
    ]
    lines += ["*filter", ":INPUT DROP [0:0]", f":FORWARD {policy} [0:0]", ":OUTPUT ACCEPT [0:0]"]
    lines += [f":{name} - [0:0]" for name in chains]
    lines += [f"-A INPUT {rule}" for rule in inputs] + [f"-A FORWARD {rule}" for rule in forward]
    lines += [f"-A {name} {rule}" for name, rules in chains.items() for rule in rules]
    return "\n".join([*lines, "COMMIT"]) + "\n"


def _with(who: str, rule: str) -> str:
    """One ``-s`` and one ``-d`` in a rule: the tenant's own gives way to the rule's."""
    for option in ("-s ", "-d "):
        if option in rule and option in who:
            who = " ".join(word for word in who.split(f" {option}")[:1])
    return f"{who} {rule}"
