"""Single nftables statements and declarations: one of everything that nft 1.0.6 can write."""

# ruff: noqa: E501
from __future__ import annotations

HOOKS = {
    "ip": "type filter hook forward priority 0",
    "ip6": "type filter hook forward priority 0",
    "inet": "type filter hook forward priority 0",
    "arp": "type filter hook input priority 0",
    "bridge": "type filter hook forward priority 0",
    "netdev": 'type filter hook ingress device "tap0" priority 0',
}
PREROUTING = "type filter hook prerouting priority 0"
OUTPUT = "type filter hook output priority 0"
INPUT = "type filter hook input priority 0"
DNAT = "type nat hook prerouting priority dstnat"
SNAT = "type nat hook postrouting priority srcnat"
ROUTE = "type route hook output priority mangle"

STATEMENTS: list[tuple[str, str, str]] = [
    # family, hook ("" for the family's own), rule
    ("ip", "", "accept"),
    ("ip", "", "ip saddr ${address} drop"),
    ("ip", "", "ip saddr ${address}/24 drop"),
    ("ip", "", "ip saddr != ${address} ip daddr 10.0.0.0/9 drop"),
    ("ip", "", "ip saddr 10.0.0.1-10.0.0.77 drop"),
    ("ip", "", "ip saddr { ${address}, 192.0.2.1 } drop"),
    ("ip", "", "ip saddr { ${address}/24, 192.0.2.0/24, 198.51.100.1-198.51.100.9 } drop"),
    ("ip", "", 'iifname "${netns}" oifname "up*" counter drop comment "of ${netns}, number ${slot}"'),
    ("ip", "", 'iifname { "${netns}", "lo" } drop'),
    ("ip", "", 'iifname "${netns}*" drop'),
    ("ip", "", "ip ttl 1 drop"),
    ("ip", "", "ip dscp cs1 counter packets 0 bytes 0"),
    ("ip", "", "ip dscp set cs3"),
    ("ip", "", "ip ttl set 64"),
    ("ip", "", "ip length 20-60 ip frag-off & 0x1fff != 0 drop"),
    ("ip", "", "ip id 7 ip version 4 ip hdrlength 5 ip checksum 1 accept"),
    ("ip", "", "ip option lsrr exists drop"),
    ("ip", "", "ip option rr ptr 1 drop"),
    ("ip", "", "ip protocol { tcp, udp } accept"),
    ("ip", "", "icmp type { echo-request, echo-reply } accept"),
    ("ip", "", "icmp type destination-unreachable icmp code 4 icmp mtu 1400 accept"),
    ("ip", "", "igmp type membership-query accept"),
    ("ip", "", "tcp dport ${port} accept"),
    ("ip", "", "tcp dport { ${port}, 443, 8000-8010 } accept"),
    ("ip", "", "tcp sport 1024-65535 tcp dport != 25 accept"),
    ("ip", "", "tcp flags syn / fin,syn,rst,ack accept"),
    ("ip", "", "tcp flags & (fin | syn) == fin | syn drop"),
    ("ip", "", "tcp option maxseg size 500-1460 accept"),
    ("ip", "", "tcp option maxseg size set rt mtu"),
    ("ip", "", "tcp option maxseg size set 1400"),
    ("ip", "", "tcp option sack-perm exists accept"),
    ("ip", "", "reset tcp option sack-perm"),
    ("ip", "", "tcp option timestamp tsval 1 accept"),
    ("ip", "", "tcp sequence 1 tcp ackseq 2 tcp window 3 tcp urgptr 4 tcp doff 5 accept"),
    ("ip", "", "udp dport 53 udp length 40-512 accept"),
    ("ip", "", "udp checksum set 0"),
    ("ip", "", "udplite dport 53 accept"),
    ("ip", "", "sctp dport 36412 accept"),
    ("ip", "", "sctp chunk data exists accept"),
    ("ip", "", "dccp type request accept"),
    ("ip", "", "th dport 1-1023 drop"),
    ("ip", "", "ah spi 1-100 accept"),
    ("ip", "", "esp spi ${slot} accept"),
    ("ip", "", "comp cpi 5 accept"),
    ("ip", "", "@th,16,16 80 accept"),
    ("ip", "", "@nh,96,32 0x0a000001 accept"),
    ("ip", "", "ct state new,established accept"),
    ("ip", "", "ct state vmap { established : accept, related : accept, invalid : drop }"),
    ("ip", "", "ct direction original ct status dnat accept"),
    ("ip", "", "ct mark ${slot} accept"),
    ("ip", "", "ct mark set meta mark"),
    ("ip", "", "ct mark set ct mark & 0xff or 0x100"),
    ("ip", "", "ct expiration > 60s accept"),
    ("ip", "", 'ct helper "ftp" accept'),
    ("ip", "", "ct l3proto ipv4 ct protocol tcp accept"),
    ("ip", "", "ct original ip saddr ${address} accept"),
    ("ip", "", "meta l4proto tcp ct reply proto-dst 80 accept"),
    ("ip", "", "ct bytes > 100000 ct original packets < 100 ct avgpkt > 200 accept"),
    ("ip", "", "ct label 12 accept"),
    ("ip", "", "ct id 1 accept"),
    ("ip", "", "ct zone 5 accept"),
    ("ip", PREROUTING, "ct zone set ${slot}"),
    ("ip", PREROUTING, "notrack"),
    ("ip", "", "ct event set new,destroy"),
    ("ip", "", "ct count over 20 drop"),
    ("ip", "", "meta mark ${mark} accept"),
    ("ip", "", "meta mark set 0x10"),
    ("ip", "", "meta mark set ip saddr map { ${address} : 1, 192.0.2.1 : 2 }"),
    ("ip", "", "meta priority set 1:10"),
    ("ip", "", "meta priority 0x10001 accept"),
    ("ip", "", "meta length > 1000 meta protocol ip accept"),
    ("inet", "", "meta nfproto ipv4 meta l4proto tcp accept"),
    ("ip", OUTPUT, "meta skuid 0 meta skgid 100-200 accept"),
    ("ip", OUTPUT, "meta cgroup 5 accept"),
    ("ip", OUTPUT, "meta rtclassid 5 accept"),
    ("ip", "", "meta pkttype { broadcast, multicast } drop"),
    ("ip", "", "meta iiftype ether meta iifgroup 3 meta oifgroup 7 accept"),
    ("ip", "", 'meta iifkind "veth" meta oifkind "tun" accept'),
    ("ip", "", "meta cpu 0 accept"),
    ("ip", "", "meta random <= 1000 accept"),
    ("ip", "", "meta ipsec missing accept"),
    ("ip", "", 'meta time < "2030-01-01 00:00:00" meta hour "08:00"-"17:00" meta day { Monday, Friday } accept'),
    ("ip", "", 'meta sdifname "vrf0" accept'),
    ("ip", "", "meta nftrace set 1"),
    ("ip", "", 'iif "lo" accept'),
    ("ip", PREROUTING, "fib saddr . iif oif missing drop"),
    ("ip", PREROUTING, "fib daddr type { local, broadcast } accept"),
    ("ip", PREROUTING, 'fib saddr . iif oifname "up0" accept'),
    ("ip", "", "rt nexthop 10.0.0.1 accept"),
    ("ip", OUTPUT, "rt classid 1 accept"),
    ("ip", "", "rt mtu > 1000 accept"),
    ("ip", PREROUTING, "socket transparent 1 accept"),
    ("ip", PREROUTING, "socket mark 5 socket wildcard 0 accept"),
    ("ip", PREROUTING, 'osf name "Linux" accept'),
    ("ip", PREROUTING, 'osf ttl skip version "Linux:4.20" accept'),
    ("ip", "", "ipsec in ip saddr 10.0.0.1 accept"),
    ("ip", "", "ipsec in reqid 5 accept"),
    ("ip", "", "limit rate ${port}/second accept"),
    ("ip", "", "limit rate over 10/minute burst 20 packets drop"),
    ("ip", "", "limit rate 10 mbytes/second burst 1 mbytes accept"),
    ("ip", "", "quota over 500 mbytes drop"),
    ("ip", "", "quota until 5000 mbytes used 3 mbytes accept"),
    ("ip", "", "counter packets 5 bytes 700 accept"),
    ("ip", "", "last"),
    ("ip", "", "log"),
    ("ip", "", 'log prefix "${netns}: " level warn flags tcp sequence,options flags ip options flags skuid'),
    ("ip", "", 'log prefix "x" group 5 snaplen 64 queue-threshold 10'),
    ("ip", "", "log level audit"),
    ("ip", "", "queue num 3"),
    ("ip", "", "reject"),
    ("ip", "", "reject with icmp admin-prohibited"),
    ("ip", "", "tcp dport 25 reject with tcp reset"),
    ("ip", "", "numgen inc mod 3 vmap { 0 : accept, 1 : drop }"),
    ("ip", "", "meta mark set numgen random mod 8 offset 100"),
    ("ip", "", "meta mark set jhash ip saddr . tcp dport mod 16 seed 0xdeadbeef"),
    ("ip", "", "meta mark set jhash ip saddr mod 16"),
    ("ip", "", "meta mark set symhash mod 2"),
    ("ip", "", "dup to 192.0.2.7"),
    ("ip", "", 'dup to 192.0.2.7 device "lo"'),
    ("ip", PREROUTING, "meta l4proto tcp tproxy to 127.0.0.1:3128"),
    ("ip", PREROUTING, "meta l4proto udp tproxy to :${port}"),
    ("ip", INPUT, "tcp dport 80 synproxy mss 1460 wscale 7 timestamp sack-perm"),
    ("ip", SNAT, "masquerade"),
    ("ip", SNAT, "masquerade random,persistent"),
    ("ip", SNAT, "meta l4proto tcp masquerade to :1024-65535"),
    ("ip", SNAT, "snat to ${address}"),
    ("ip", SNAT, "ip protocol tcp snat to 192.0.2.1-192.0.2.9:2000-3000 fully-random"),
    ("ip", SNAT, "snat ip to ip saddr map { 10.0.0.2 : ${address} }"),
    ("ip", SNAT, "snat ip prefix to ip saddr map { 10.0.0.0/24 : 192.0.2.0/24 }"),
    ("ip", DNAT, "tcp dport ${port} dnat to 172.16.0.2:80"),
    ("ip", DNAT, "dnat to numgen inc mod 2 map { 0 : 10.0.0.1, 1 : 10.0.0.2 }"),
    ("ip", DNAT, "tcp dport 80 redirect to :8080"),
    ("ip", DNAT, "tcp dport vmap { 22 : accept, 80 : continue, 81 : return }"),
    ("ip", ROUTE, "meta mark set 1"),
    (
        "ip",
        "",
        "ip daddr 192.0.2.1 jump {\n ip saddr ${address} drop\n tcp dport 1 jump other\n accept\n }\n }\n chain other {\n drop",
    ),
    ("ip", "", "ip daddr 192.0.2.1 goto {\n counter drop\n }"),
    ("ip", "", "ip saddr . ip daddr . tcp dport { 10.0.0.1 . 10.0.0.2 . 80, ${address} . 1.1.1.1 . ${port} } accept"),
    ("ip", "", "ip saddr . tcp dport { 10.0.0.0/8 . 80-90, ${address} . ${port} } accept"),
    ("ip", "", "ip saddr . tcp dport vmap { 10.0.0.1 . 80 : accept, 10.0.0.2 . 81 : drop }"),
    ("ip", "", "ip saddr & 0.0.0.255 == 7 accept"),
    ("ip", "", "ip saddr 1.1.1.1 ip saddr set 2.2.2.2 ip daddr set ${address}"),
    ("ip", "", "tcp dport set 8080"),
    ("ip6", "", "ip6 saddr ${address6} drop"),
    ("ip6", "", "ip6 saddr { ${address6}/64, 2001:db8::/32 } drop"),
    ("ip6", "", "ip6 hoplimit 255 ip6 nexthdr tcp ip6 flowlabel 5 ip6 length 100 accept"),
    ("ip6", "", "ip6 dscp set af11 ip6 hoplimit set 64"),
    ("ip6", "", "icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept"),
    ("ip6", "", "icmpv6 type packet-too-big icmpv6 mtu 1280 accept"),
    ("ip6", "", "exthdr hbh exists drop"),
    ("ip6", "", "rt type 0 drop"),
    ("ip6", "", "frag more-fragments 1 frag id 5 drop"),
    ("ip6", "", "dst nexthdr tcp mh type binding-update accept"),
    ("ip6", "", "srh last-entry 1 accept"),
    ("ip6", "", "reject with icmpv6 no-route"),
    ("ip6", SNAT, "snat to ${address6}"),
    ("ip6", DNAT, "tcp dport 80 dnat to [fd00::2]:8080"),
    ("ip6", "", "ip6 saddr & ::ffff == ::1 accept"),
    ("inet", "", "meta nfproto ipv6 drop"),
    ("inet", "", "reject with icmpx admin-prohibited"),
    ("inet", "", "ip saddr ${address} accept"),
    ("inet", DNAT, "dnat ip to 172.16.0.2"),
    ("inet", DNAT, "dnat ip to ip protocol . tcp dport map { tcp . ${port} : 172.16.0.2 . 80 }"),
    ("inet", SNAT, "oifname up0 snat ip6 to fd00::1"),
    ("inet", PREROUTING, "meta l4proto tcp tproxy ip to 127.0.0.1:50080"),
    ("inet", 'type filter hook ingress device "tap0" priority 0', "ip saddr 10.0.0.1 drop"),
    ("arp", "", "arp operation request arp saddr ip ${address} accept"),
    ("arp", "", "arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp daddr ether 00:11:22:33:44:55 accept"),
    ("bridge", "", "ether saddr ${mac} ether type ip ip saddr ${address} accept"),
    ("bridge", "", "vlan id ${port} vlan pcp 3 accept"),
    ("bridge", "", 'meta ibrname "br0" accept'),
    ("bridge", "", "ether saddr { 00:11:22:33:44:55, ${mac} } drop"),
    ("bridge", PREROUTING, "ether daddr set 00:11:22:33:44:55"),
    ("netdev", "", "ip saddr ${address} drop"),
    ("netdev", "", 'fwd to "lo"'),
    ("netdev", "", 'dup to "lo"'),
    ("netdev", "", "ether type arp limit rate 10/second accept"),
    ("netdev", 'type filter hook ingress devices = { tap0, "up0" } priority -500', "drop"),
    ("netdev", 'type filter hook egress device "tap0" priority 0', "ip daddr 10.0.0.1 drop"),
    ("netdev", 'type filter hook ingress device "${netns}" priority 0', "drop"),
]

TABLES = [
    # whole files
    "table ip empty {\n}\n",
    'table ip t {\n comment "table of ${netns}"\n chain c {\n comment "chain of ${netns}"\n accept\n }\n}\n',
    "table ip t {\n flags dormant\n chain c {\n type filter hook input priority 0; policy drop;\n accept\n }\n}\n",
    "table inet t {\n chain a {\n type filter hook input priority filter + ${slot}; policy drop;\n jump b\n }\n"
    " chain b {\n goto c\n }\n chain c {\n return\n }\n}\n",
    "table ip t${slot} {\n chain ${netns} {\n type filter hook input priority 0;\n accept\n }\n}\n",
    'table ip t {\n set s {\n type ipv4_addr\n elements = { ${address}, 10.0.0.1 comment "x ${netns}" }\n }\n}\n',
    "table ip t {\n set s {\n type ipv4_addr; flags interval; auto-merge\n"
    ' elements = { ${address}/30, 192.0.2.0/24, 192.0.3.0/24 }\n comment "c ${slot}"\n }\n}\n',
    "table ip t {\n set s {\n type ipv4_addr . inet_service; flags interval\n"
    " elements = { 10.0.0.0/8 . 1-5, ${address} . ${port} }\n }\n}\n",
    "table ip t {\n set s {\n type ipv4_addr; flags timeout; timeout 1h; gc-interval 1m\n"
    " elements = { 10.0.0.1 timeout 2h, ${address} }\n }\n}\n",
    "table ip t {\n set s {\n type ipv4_addr; size 1000; policy memory\n counter\n elements = { ${address} counter packets 0 bytes 0 }\n }\n}\n",
    "table inet t {\n set s {\n typeof ip saddr . tcp dport\n elements = { ${address} . 22 }\n }\n"
    ' set n {\n typeof meta iifname\n elements = { "${netns}" }\n }\n set m {\n type mark\n elements = { ${mark} }\n }\n'
    " set e {\n type ether_addr\n elements = { ${mac} }\n }\n}\n",
    "table ip t {\n map m {\n type ipv4_addr : verdict\n elements = { ${address} : jump c, 10.0.0.1 : drop }\n }\n"
    " chain c {\n accept\n }\n chain f {\n type filter hook input priority 0;\n ip saddr vmap @m\n }\n}\n",
    "table ip t {\n map m {\n type inet_service : ipv4_addr . inet_service\n elements = { ${port} : ${address} . 80 }\n }\n"
    " chain p {\n type nat hook prerouting priority dstnat;\n dnat ip to tcp dport map @m\n }\n}\n",
    "table ip t {\n map m {\n type ipv4_addr : mark; flags interval\n elements = { ${address}/24 : ${mark} }\n }\n}\n",
    "table ip t {\n set d {\n type ipv4_addr; flags dynamic,timeout; size 65535; timeout 1m\n }\n"
    " chain f {\n type filter hook input priority 0;\n"
    " add @d { ip saddr timeout 10s limit rate over 5/second burst 7 packets } drop\n"
    " update @d { ip saddr counter } accept\n delete @d { ip saddr }\n }\n}\n",
    "table ip t {\n set d {\n type ipv4_addr; flags dynamic; size 100\n }\n"
    " chain f {\n type filter hook input priority 0;\n add @d { ip saddr ct count over 3 } drop\n }\n}\n",
    "table ip t {\n map d {\n type ipv4_addr : mark; flags dynamic; size 100\n }\n"
    " chain f {\n type filter hook input priority 0;\n update @d { ip saddr : meta mark }\n }\n}\n",
    "table ip t {\n chain f {\n type filter hook input priority 0;\n"
    " meter flood size 1000 { ip saddr timeout 5s limit rate 10/second } accept\n }\n}\n",
    'table ip t {\n counter c {\n packets 5 bytes 100\n comment "of ${netns}"\n }\n quota q {\n over ${slot} mbytes\n }\n'
    " limit l {\n rate ${port}/second burst 5 packets\n }\n"
    ' chain f {\n type filter hook input priority 0;\n counter name "c"\n quota name "q" drop\n limit name "l" accept\n'
    ' counter name tcp dport map { 80 : "c" }\n }\n}\n',
    'table ip t {\n ct helper h {\n type "ftp" protocol tcp\n l3proto ip\n }\n ct timeout w {\n protocol tcp\n l3proto ip\n'
    " policy = { established : 100, close : 4 }\n }\n ct expectation e {\n protocol udp\n dport ${port}\n timeout 10s\n size 12\n"
    ' l3proto ip\n }\n chain f {\n type filter hook prerouting priority 0;\n tcp dport 21 ct helper set "h"\n'
    ' ct timeout set "w"\n ct expectation set "e"\n }\n}\n',
    "table ip t {\n ct timeout w {\n protocol tcp\n l3proto ip\n policy = { established : 100, close : 4 }\n }\n"
    ' chain f {\n type filter hook prerouting priority 0;\n ct timeout set "w"\n }\n}\n',
    "table ip t {\n ct expectation e {\n protocol udp\n dport ${port}\n timeout 10s\n size 12\n l3proto ip\n }\n"
    ' chain f {\n type filter hook prerouting priority 0;\n ct expectation set "e"\n }\n}\n',
    "table ip t {\n synproxy s {\n mss 1460\n wscale 7\n timestamp sack-perm\n }\n"
    ' chain f {\n type filter hook input priority 0;\n tcp dport 80 synproxy name "s"\n }\n}\n',
    'table ip t {\n secmark s {\n "system_u:object_r:x_t:s0"\n }\n chain f {\n type filter hook input priority 0;\n'
    ' meta secmark set "s"\n }\n}\n',
    "table inet t {\n flowtable f {\n hook ingress priority 0\n devices = { tap0 }\n }\n"
    " chain c {\n type filter hook forward priority 0;\n flow add @f\n }\n}\n",
    "define who = { ${address}, 192.0.2.9 }\ntable ip t {\n chain f {\n ip saddr $who drop\n }\n}\n",
    "define dev = tap0\ntable netdev t {\n chain f {\n type filter hook ingress device $dev priority 0;\n drop\n }\n}\n",
    "table ip a {\n chain f {\n type filter hook input priority 0;\n accept\n }\n}\n"
    "table ip6 a {\n chain f {\n type filter hook input priority 0;\n drop\n }\n}\n"
    "table inet b {\n set s {\n type inet_service\n elements = { ${port} }\n }\n}\n"
    "table arp a {\n}\ntable bridge a {\n}\ntable netdev a {\n}\n",
    "add table ip t\nadd chain ip t c { type filter hook input priority 0; }\nadd rule ip t c tcp dport 22 accept\n"
    "insert rule ip t c ip saddr ${address} drop\n",
]


def file_of(family: str, hook: str, rule: str) -> str:
    """A whole file with one rule."""
    return f"table {family} t {{\n chain c {{\n {hook or HOOKS[family]}; policy accept;\n {rule}\n }}\n}}\n"


FILES = [file_of(*statement) for statement in STATEMENTS] + TABLES


def values(slot: int) -> dict[str, str]:
    """A slot's own values, as many kinds as there are."""
    return {
        "slot": str(slot),
        "netns": f"slot{slot}",
        "address": f"10.201.{slot // 256}.{slot % 256}",
        "address6": f"fd5c:a7e:10:{slot:x}::2",
        "port": str(1000 + 3 * slot),
        "mark": hex(slot + 16),
        "mac": f"02:00:00:00:{slot // 256:02x}:{slot % 256:02x}",
    }
