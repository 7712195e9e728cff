// SPDX-License-Identifier: Apache-2.0
/* Finds the transport header and leaves it in cb[0] for the filter behind it; drops what has none to be found.
 *
 * A program of its own because it is the same in every slot: the walk over IPv6 extension headers is by far the
 * most work for the verifier, so it is verified once and not each time that a slot's list changes.
 */
#include "packet.h"

char gpl[] SEC("license") = "GPL";

SEC("tc/egress")
int parse_egress(struct __sk_buff *skb)
{
	struct transport t = {};

	if (skb->protocol == ETH_IPV4) {
		struct ipv4 ip;

		if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || find_transport4(&ip, ETH_LEN, &t))
			return TC_ACT_SHOT;
	} else if (skb->protocol == ETH_IPV6) {
		struct ipv6 ip;

		if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || find_transport6(skb, &ip, ETH_LEN, &t))
			return TC_ACT_SHOT;
	}
	skb->cb[0] = t.offset | (__u32)t.protocol << 16 | (__u32)t.fragment << 24;
	return TC_ACT_UNSPEC;
}
