"""Single rules, at least one for every match and target of iptables that a kernel may have.

``EVERY`` are rules of both families, by table; ``${...}`` are a slot's own values. A rule that the machine's tool or
kernel does not know is reported by the test as skipped, with the tool's words.
"""

from __future__ import annotations

VALUES = {
    "slot": "17",
    "small": "17",
    "address": "10.201.0.35",
    "guest_address": "172.16.0.2",
    "guest_network": "172.16.0.0/30",
    "address6": "fd5c:a7e:10:11::2",
    "guest_address6": "fd00:16::2",
    "guest_network6": "fd00:16::/64",
    "guest_if": "tap0",
    "uplink_if": "up0",
    "guest_mac": "06:00:ac:10:00:02",
    "mark": "0x1017",
    "port": "20017",
    "name": "slot17",
}
OTHER = VALUES | {
    "slot": "3999",
    "small": "99",
    "address": "10.201.31.63",
    "address6": "fd5c:a7e:10:f9f::2",
    "mark": "0x1f9f",
    "port": "23999",
    "name": "slot3999",
}

EVERY: dict[str, list[str]] = {
    "filter": [
        "-A FORWARD -j ACCEPT",
        "-A FORWARD -j RETURN",
        "-A FORWARD",
        "-A FORWARD ! -i ${guest_if} -o ${uplink_if} -j DROP",
        "-A FORWARD -i ${guest_if}+ -j DROP",
        "-A FORWARD -p tcp -m tcp --dport ${port} -j ACCEPT",
        "-A FORWARD -p tcp -m tcp --sport ${port}:65535 ! --dport 80 -j ACCEPT",
        "-A FORWARD -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN --tcp-option 2 -j ACCEPT",
        "-A FORWARD -p udp -m udp --sport ${port} ! --dport 10:20 -j ACCEPT",
        "-A FORWARD -p sctp -m sctp --dport ${port} --chunk-types any DATA,INIT -j ACCEPT",
        "-A FORWARD -p dccp -m dccp --dport ${port} --dccp-types REQUEST,RESPONSE -j ACCEPT",
        "-A FORWARD -p tcp -m multiport --dports 80,443,${port},8000:8100 -j ACCEPT",
        "-A FORWARD -p udp -m multiport ! --ports 53,${port} -j ACCEPT",
        "-A FORWARD -p esp -m esp --espspi 1:${slot} -j ACCEPT",
        "-A FORWARD -p ipcomp -m ipcomp --ipcompspi 18 -j ACCEPT",
        "-A FORWARD -m addrtype --dst-type LOCAL --limit-iface-in -j DROP",
        "-A FORWARD -m addrtype ! --src-type UNICAST -j DROP",
        '-A FORWARD -m bpf --bytecode "4,48 0 0 9,21 0 1 6,6 0 0 1,6 0 0 0" -j ACCEPT',
        "-A OUTPUT -m cgroup --cgroup ${slot} -j ACCEPT",
        "-A OUTPUT -m cgroup ! --path / -j ACCEPT",
        "-A FORWARD -m cluster --cluster-total-nodes 4 --cluster-local-node 2 --cluster-hash-seed 0xdead -j ACCEPT",
        '-A FORWARD -m comment --comment "slot ${slot}: it\'s \\"quoted\\"" -j ACCEPT',
        "-A FORWARD -m comment --comment ${name} -j ACCEPT",
        "-A FORWARD -m connbytes --connbytes 1000:${port} --connbytes-mode bytes --connbytes-dir both -j ACCEPT",
        "-A FORWARD -m connlabel --label ${small} --set -j ACCEPT",
        "-A FORWARD -p tcp -m connlimit --connlimit-above ${slot} --connlimit-mask 24 --connlimit-saddr -j DROP",
        "-A FORWARD -m connlimit --connlimit-upto 7 --connlimit-daddr -j ACCEPT",
        "-A FORWARD -m connmark --mark ${mark} -j ACCEPT",
        "-A FORWARD -m connmark ! --mark ${mark}/0xffff -j ACCEPT",
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -m conntrack --ctstate UNTRACKED --ctproto tcp --ctorigdstport ${port} --ctdir ORIGINAL -j DROP",
        "-A FORWARD -m conntrack --ctstatus SEEN_REPLY,ASSURED --ctexpire 10:${slot}0 -j ACCEPT",
        "-A FORWARD -m cpu --cpu 1 -j ACCEPT",
        "-A FORWARD -m devgroup --src-group ${slot} ! --dst-group 0x10/0xf0 -j ACCEPT",
        "-A FORWARD -m dscp --dscp 0x0a -j ACCEPT",
        "-A FORWARD -m dscp --dscp-class EF -j ACCEPT",
        "-A FORWARD -p tcp -m ecn --ecn-tcp-cwr ! --ecn-tcp-ece --ecn-ip-ect 1 -j ACCEPT",
        "-A FORWARD -m hashlimit --hashlimit-upto 50/sec --hashlimit-burst 10 --hashlimit-mode srcip,dstport "
        "--hashlimit-name ${name} --hashlimit-htable-expire 30000 -j ACCEPT",
        "-A FORWARD -m hashlimit --hashlimit-above 1mb/s --hashlimit-name bytes --hashlimit-mode dstip "
        "--hashlimit-srcmask 24 -j DROP",
        "-A FORWARD -m hashlimit --hashlimit-upto 100/sec --hashlimit-name rated --hashlimit-rate-match "
        "--hashlimit-rate-interval 2 -j ACCEPT",
        "-A FORWARD -m helper --helper ftp-${port} -j ACCEPT",
        "-A FORWARD -m ipvs --ipvs -j ACCEPT",
        "-A FORWARD -m length --length 100:${port} -j ACCEPT",
        "-A FORWARD -m limit --limit 5/sec --limit-burst ${slot} -j ACCEPT",
        "-A FORWARD -m limit --limit ${slot}/minute -j ACCEPT",
        "-A FORWARD -m mac --mac-source ${guest_mac} -j ACCEPT",
        "-A FORWARD -m mark --mark ${mark}/0xffff -j ACCEPT",
        "-A FORWARD -m nfacct --nfacct-name ${name} -j ACCEPT",
        "-A FORWARD -p tcp -m osf --genre Linux --ttl 1 -j ACCEPT",
        "-A OUTPUT -m owner --uid-owner ${slot} --gid-owner 5-10 -j ACCEPT",
        "-A OUTPUT -m owner --socket-exists -j ACCEPT",
        "-A FORWARD -m physdev --physdev-in ${guest_if} --physdev-is-bridged -j ACCEPT",
        "-A FORWARD -m pkttype --pkt-type multicast -j DROP",
        "-A FORWARD -m policy --dir in --pol ipsec --strict --reqid ${slot} --proto esp --mode transport -j ACCEPT",
        "-A FORWARD -m quota --quota ${port}000 -j ACCEPT",
        "-A FORWARD -m rateest --rateest est1 --rateest-gt --rateest-pps 100 -j ACCEPT",
        "-A FORWARD -m recent --name ${name} --set --rsource -j ACCEPT",
        "-A FORWARD -m recent --name seen --update --seconds ${slot} --hitcount 4 --rdest --rttl -j DROP",
        "-A FORWARD -m recent --name gone --remove -j DROP",
        "-A FORWARD -m set --match-set ${set} dst -j ACCEPT",
        "-A FORWARD -m set ! --match-set ${set} src,dst -j ACCEPT",
        "-A FORWARD -m state --state NEW -j ACCEPT",
        "-A FORWARD -m statistic --mode random --probability 0.25 -j DROP",
        "-A FORWARD -m statistic --mode nth --every ${slot} --packet 2 -j DROP",
        '-A FORWARD -m string --algo bm --from 10 --to ${small}00 --string "a ${name}" -j DROP',
        '-A FORWARD -m string --algo kmp --icase --hex-string "|de ad be ef|x" -j DROP',
        "-A FORWARD -p tcp --syn -m tcpmss --mss 500:${small}00 -j DROP",
        "-A FORWARD -m time --timestart 08:00 --timestop 18:30 --weekdays Mon,Tue,Fri --kerneltz -j ACCEPT",
        "-A FORWARD -m time --datestart 2026-01-01T00:00:00 --monthdays 1,2,28 -j ACCEPT",
        "-A FORWARD -m tos --tos 0x10/0x3f -j ACCEPT",
        '-A FORWARD -m u32 --u32 "6&0xFF=0x6&&4&0x1FFF=0:${slot}" -j DROP',
        "-A FORWARD -p tcp -j REJECT --reject-with tcp-reset",
        "-A INPUT -p udp -m socket --nowildcard -j ACCEPT",
        "-A FORWARD -j AUDIT --type drop",
        "-A FORWARD -j IDLETIMER --timeout ${slot} --label netslot-test",
        "-A FORWARD -j LED --led-trigger-id ${name}",
        '-A FORWARD -j LOG --log-prefix "slot ${slot}: " --log-level 4 --log-tcp-options --log-ip-options --log-uid',
        '-A FORWARD -j NFLOG --nflog-group ${slot} --nflog-prefix "${name} drop" --nflog-threshold 5',
        "-A FORWARD -j NFQUEUE --queue-num ${slot} --queue-bypass",
        "-A FORWARD -j NFQUEUE --queue-balance 1:${slot} --queue-cpu-fanout",
        "-A FORWARD -j RATEEST --rateest-name ${name} --rateest-interval 250ms --rateest-ewmalog 2s",
        "-A FORWARD -j SET --add-set ${set} src --exist",
        "-A FORWARD -j SET --del-set ${set} dst",
        "-A INPUT -p tcp -m tcp --dport ${port} -j SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1460",
        "-A FORWARD -j own${slot}",
        "-A FORWARD -g own${slot}",
    ],
    "mangle": [
        "-A POSTROUTING -p udp -j CHECKSUM --checksum-fill",
        "-A POSTROUTING -j CLASSIFY --set-class 1:10",
        "-A FORWARD -j CONNMARK --set-xmark ${mark}/0xffffffff",
        "-A FORWARD -j CONNMARK --save-mark --nfmask 0xffff --ctmask 0xff",
        "-A FORWARD -j CONNMARK --restore-mark",
        "-A FORWARD -j CONNSECMARK --save",
        "-A FORWARD -j DSCP --set-dscp 0x2e",
        "-A FORWARD -j HMARK --hmark-tuple src,dst,sport --hmark-mod ${slot} --hmark-rnd 0xcafe --hmark-offset 100",
        "-A FORWARD -j MARK --set-mark ${mark}",
        "-A FORWARD -j MARK --or-mark ${mark}",
        "-A FORWARD -j MARK --and-mark ${mark}",
        "-A FORWARD -j MARK --set-xmark ${mark}/0xffff",
        "-A FORWARD -j SECMARK --selctx system_u:object_r:netslot_t:s0",
        "-A FORWARD -p tcp --syn -j TCPMSS --set-mss ${small}0",
        "-A FORWARD -p tcp --syn -j TCPMSS --clamp-mss-to-pmtu",
        "-A FORWARD -p tcp -j TCPOPTSTRIP --strip-options mss,sack",
        "-A FORWARD -j TOS --set-tos 0x10/0x3f",
        "-A PREROUTING -m rpfilter --loose --invert -j DROP",
        "-A PREROUTING -p tcp -m socket --transparent --restore-skmark -j MARK --set-mark 1",
    ],
    "raw": [
        "-A PREROUTING -j CT --notrack",
        "-A PREROUTING -j CT --zone ${slot}",
        "-A PREROUTING -j CT --zone-orig ${slot} --ctevents new,destroy",
        "-A PREROUTING -p tcp --dport 21 -j CT --helper ftp",
        "-A PREROUTING -p tcp -j CT --timeout long",
        "-A PREROUTING -j NOTRACK",
        "-A PREROUTING -j TRACE",
    ],
    "nat": [
        "-A PREROUTING -p tcp -m tcp --dport ${port} -j REDIRECT --to-ports ${port}",
        "-A PREROUTING -p udp -j REDIRECT --to-ports 1000-${port} --random",
        "-A POSTROUTING -o ${uplink_if} -j MASQUERADE",
        "-A POSTROUTING -o ${uplink_if} -p tcp -j MASQUERADE --to-ports 1024-${port} --random-fully",
    ],
    "security": ["-A FORWARD -s ${local} -j ACCEPT"],
}

IPV4: dict[str, list[str]] = {
    "filter": [
        "-A FORWARD -s ${address} ! -d ${guest_network} -j ACCEPT",
        "-A FORWARD -s ${address}/24 -d 10.0.0.0/255.0.0.0 -j ACCEPT",
        "-A FORWARD -s 10.0.0.0/255.255.0.255 -j ACCEPT",
        "-A FORWARD -f -j DROP",
        "-A FORWARD -s 10.1.0.0/16,${address} -d 1.1.1.1,2.2.2.2 -j ACCEPT",
        "-A FORWARD -p icmp -m icmp --icmp-type 3/4 -j ACCEPT",
        "-A FORWARD -p icmp -m icmp ! --icmp-type any -j ACCEPT",
        "-A FORWARD -p ah -m ah --ahspi 1:${slot} -j ACCEPT",
        "-A FORWARD -m iprange --src-range 10.0.0.1-${address} -j ACCEPT",
        "-A FORWARD -m realm --realm ${slot} -j ACCEPT",
        "-A FORWARD -m ttl --ttl-lt ${small} -j DROP",
        "-A FORWARD -m conntrack --ctorigsrc ${address} --ctrepldst ${guest_network} -j ACCEPT",
        "-A FORWARD -m policy --dir out --pol ipsec --strict --tunnel-src ${address} --mode tunnel "
        "--tunnel-dst 1.2.3.4 -j ACCEPT",
        "-A FORWARD -j REJECT --reject-with icmp-net-prohibited",
        "-A INPUT -d ${address} -i ${uplink_if} -p tcp -m set --match-set allow src -j CLUSTERIP --new "
        "--hashmode sourceip --clustermac 01:00:5e:00:00:01 --total-nodes 2 --local-node 1",
    ],
    "mangle": [
        "-A FORWARD -p tcp -j ECN --ecn-tcp-remove",
        "-A FORWARD -j TTL --ttl-set ${small}",
        "-A FORWARD -j TTL --ttl-inc 1",
        "-A PREROUTING -j TEE --gateway ${guest_address}",
        "-A PREROUTING -j TEE --gateway ${guest_address} --oif ${guest_if}",
        "-A PREROUTING -p tcp -j TPROXY --on-port ${port} --on-ip 127.0.0.1 --tproxy-mark ${mark}/0xffff",
    ],
    "nat": [
        "-A PREROUTING -d ${address} -j DNAT --to-destination ${guest_address}",
        "-A PREROUTING -p tcp -m tcp --dport ${port} -j DNAT --to-destination ${guest_address}:80",
        "-A PREROUTING -p tcp -j DNAT --to-destination ${guest_address}-172.16.0.9:80-${port} --random --persistent",
        "-A POSTROUTING -s ${guest_address} -j SNAT --to-source ${address}",
        "-A POSTROUTING -p udp -j SNAT --to-source ${address}:1024-${port} --random-fully",
        "-A PREROUTING -d ${address} -j NETMAP --to 10.9.0.0/16",
        "-A POSTROUTING -s 192.168.0.0/24 -j NETMAP --to ${guest_network}",
    ],
}

IPV6: dict[str, list[str]] = {
    "filter": [
        "-A FORWARD -s ${address6} ! -d ${guest_network6} -j ACCEPT",
        "-A FORWARD -s ${address6}/64 -j ACCEPT",
        "-A FORWARD -p ipv6-icmp -m icmp6 --icmpv6-type echo-request -j ACCEPT",
        "-A FORWARD -p ipv6-icmp -m icmp6 --icmpv6-type 1/4 -j ACCEPT",
        "-A FORWARD -m ah --ahspi ${slot} --ahlen 10 --ahres -j ACCEPT",
        "-A FORWARD -m dst --dst-len 8 --dst-opts 1:2,3 -j DROP",
        "-A FORWARD -m hbh --hbh-len 8 --hbh-opts 5:2 -j DROP",
        "-A FORWARD -m eui64 -j ACCEPT",
        "-A FORWARD -m frag --fragid 1:${slot} --fragfirst -j DROP",
        "-A FORWARD -m hl --hl-lt ${small} -j DROP",
        "-A FORWARD -m iprange --dst-range fd00::1-${address6} -j ACCEPT",
        "-A FORWARD -m ipv6header --header hop-by-hop,dst --soft -j DROP",
        "-A FORWARD -p ipv6-mh -m mh --mh-type 1:3 -j DROP",
        "-A FORWARD -m rt --rt-type 0 --rt-segsleft 1:${slot} -j DROP",
        "-A FORWARD -m rt --rt-type 0 --rt-0-res --rt-0-addrs ${address6} --rt-0-not-strict -j DROP",
        "-A FORWARD -m srh --srh-next-hdr 17 --srh-segs-left-gt 2 -j DROP",
        "-A FORWARD -m srh --srh-psid ${guest_network6} -j DROP",
        "-A FORWARD -m conntrack --ctorigsrc ${address6} -j ACCEPT",
        "-A FORWARD -j REJECT --reject-with icmp6-adm-prohibited",
    ],
    "mangle": [
        "-A FORWARD -j HL --hl-set ${small}",
        "-A PREROUTING -j TEE --gateway ${guest_address6}",
        "-A PREROUTING -p tcp -j TPROXY --on-port ${port} --on-ip ${guest_address6} --tproxy-mark 1/1",
        "-A PREROUTING -j DNPT --src-pfx fd00::/64 --dst-pfx 2001:db8::/64",
        "-A POSTROUTING -j SNPT --src-pfx ${guest_network6} --dst-pfx 2001:db8::/64",
    ],
    "nat": [
        "-A PREROUTING -d ${address6} -j DNAT --to-destination ${guest_address6}",
        "-A PREROUTING -p tcp -m tcp --dport ${port} -j DNAT --to-destination [${guest_address6}]:80",
        "-A POSTROUTING -s ${guest_address6} -j SNAT --to-source ${address6}",
        "-A POSTROUTING -s ${guest_network6} -j NETMAP --to 2001:db8:${slot}::/64",
    ],
}


def collection() -> list[tuple[str, str, str]]:
    """(tool, table, rule) of all rules; ``${local}`` and ``${set}`` become the family's own address and set."""
    found = []
    for tool, own, version in (("iptables", IPV4, ""), ("ip6tables", IPV6, "6")):
        for rules in (EVERY, own):
            for table, lines in rules.items():
                found += [
                    (
                        tool,
                        table,
                        line.replace("${local}", f"${{address{version}}}").replace("${set}", f"allow{version}"),
                    )
                    for line in lines
                ]
    return found


def file_of(table: str, rule: str) -> str:
    """A rule file with that one rule, the chain and the estimators that it may refer to."""
    user = ":own${slot} - [0:0]\n" if "own${slot}" in rule else ""
    before = "-A FORWARD -j RATEEST --rateest-name est1 --rateest-interval 1s --rateest-ewmalog 4s\n"
    return f"*{table}\n{user}{before if '-m rateest' in rule else ''}{rule}\nCOMMIT\n"
