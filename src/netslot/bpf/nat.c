// SPDX-License-Identifier: Apache-2.0
/* Stateless one-to-one NAT between the guest's address and the slot's own, on the slot's uplink.
 *
 * egress:  a forwarded packet must come from the guest; its source becomes the slot's address.
 *          What the slot's own kernel sends passes with its own source only.
 * ingress: the slot's address becomes the guest's. A packet addressed to the guest directly is dropped:
 *          only the slot's address is valid outside. What belongs to a tunnel of the slot's own stays the slot's.
 * ICMP errors quote the packet they are about, in the other direction, so the quoted header is translated too.
 * The guest's address is the same in every slot. The slot's follows from its number, which is the filter's
 * class id: the one value that an attachment can give to a program that all attachments share.
 */
#include "packet.h"

char gpl[] SEC("license") = "GPL";

const volatile __u32 guest4;
const volatile struct in6 guest6;

/* Slot k has the address base + k x step; in the host's byte order, IPv6 as two halves without carry. */
const volatile __u32 base4;
const volatile __u32 step4;
const volatile __u64 base6_upper;
const volatile __u64 base6_lower;
const volatile __u64 step6_upper;
const volatile __u64 step6_lower;

/* What comes to the slot itself and not to the guest, the packets of its tunnels: protocol << 16 | UDP port, where
 * port 0 is the whole protocol. The first 0 ends the list. */
#define OWN 8
const volatile __u32 own[OWN];

/* One translation: the address `from` becomes `to`; `diff` is what that does to a checksum over them. */
struct change {
	struct in6 from;
	struct in6 to;
	__s64 diff;
};

/* Where the checksum that covers the pseudo header is in a transport header; 0: there is none. */
static __always_inline __u32 checksum_place(__u8 protocol, int v6)
{
	if (protocol == PROTO_TCP)
		return 16;
	if (protocol == PROTO_UDP || protocol == PROTO_UDPLITE || protocol == PROTO_DCCP)
		return 6;
	return v6 && protocol == PROTO_ICMPV6 ? 2 : 0;
}

static __always_inline int fix_transport(struct __sk_buff *skb, const struct transport *t, __s64 diff, int v6)
{
	__u32 place = checksum_place(t->protocol, v6);

	if (t->protocol == PROTO_AUTH)
		return -1;
	if (!place || t->fragment == 2)
		return 0;
	/* MARK_MANGLED_0 leaves a UDP checksum of 0 alone (none was computed) and never makes one. A first
	 * fragment too short to hold the checksum fails here and is dropped. */
	return bpf_l4_csum_replace(skb, t->offset + place, 0, diff,
				   BPF_F_PSEUDO_HDR | (t->protocol == PROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0));
}

/* The quoted packet's own transport checksum, so that its sender finds in the quote what it sent. Whatever the
 * checksum changes by, the ICMP checksum over it must undo. Quotes too short to hold one are common and fine. */
static __always_inline int fix_quoted_transport(struct __sk_buff *skb, const struct transport *t, __s64 diff,
						__u32 icmp_checksum, int v6)
{
	__u32 place = t->protocol == PROTO_ICMPV6 && v6 ? 2 : checksum_place(t->protocol, v6);
	__u16 before, after;

	if (!place || t->fragment == 2)
		return 0;
	if (bpf_skb_load_bytes(skb, t->offset + place, &before, sizeof(before)))
		return 0;
	if (t->protocol == PROTO_UDP && before == 0)
		return 0;
	if (bpf_l4_csum_replace(skb, t->offset + place, 0, diff, t->protocol == PROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0))
		return -1;
	if (bpf_skb_load_bytes(skb, t->offset + place, &after, sizeof(after)))
		return -1;
	return bpf_l4_csum_replace(skb, icmp_checksum, before, after, sizeof(after));
}

/* Whether a packet is the slot's own, or of a `quoted` one, which the slot sent, whether it was. */
static __always_inline int is_own(struct __sk_buff *skb, const struct transport *t, int quoted)
{
	__u16 ports[2] = {};

	/* Fails for a header that is cut off, which then has no ports. */
	if (own[0] && t->protocol == PROTO_UDP && t->fragment != 2)
		bpf_skb_load_bytes(skb, t->offset, ports, sizeof(ports));
	for (int i = 0; i < OWN && own[i]; i++) {
		__u16 port = bpf_htons(own[i] & 0xffff);

		if (own[i] >> 16 != t->protocol)
			continue;
		if (!port || ports[1] == port || (quoted && ports[0] == port))
			return 1;
	}
	return 0;
}

static __always_inline int is_error4(__u8 type)
{
	return type == 3 || type == 4 || type == 5 || type == 11 || type == 12;
}

/* `source`: the quoted packet's source is ours (the error travels towards the guest), else its destination.
 * Returns 1 for an error about a packet of the slot's own. */
static __always_inline int fix_quote4(struct __sk_buff *skb, const struct transport *outer, __u32 from, __u32 to,
				      __s64 diff, int source)
{
	__u32 at = outer->offset + 8;
	struct transport t;
	struct ipv4 ip;
	__u8 type;

	if (outer->fragment == 2 || bpf_skb_load_bytes(skb, outer->offset, &type, 1) || !is_error4(type))
		return 0;
	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || find_transport4(&ip, at, &t))
		return -1;
	if ((source ? ip.source : ip.destination) != from)
		return 0;
	if (source && is_own(skb, &t, 1))
		return 1;
	if (bpf_skb_store_bytes(skb, at + (source ? 12 : 16), &to, sizeof(to), 0))
		return -1;
	/* The quoted header's checksum takes up what its address changed by, so the ICMP checksum stays right. */
	if (bpf_l3_csum_replace(skb, at + 10, from, to, sizeof(to)))
		return -1;
	return fix_quoted_transport(skb, &t, diff, outer->offset + 2, 0);
}

static __always_inline int fix_quote6(struct __sk_buff *skb, const struct transport *outer, const struct change *c,
				      int source)
{
	__u32 at = outer->offset + 8;
	struct transport t = {};
	struct ipv6 ip;
	int headless;
	__u8 type;

	/* ICMPv6 errors are types 1 to 4. */
	if (outer->fragment == 2 || bpf_skb_load_bytes(skb, outer->offset, &type, 1) || type < 1 || type > 4)
		return 0;
	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
		return -1;
	if (!same6(source ? &ip.source : &ip.destination, &c->from))
		return 0;
	/* A quote that ends inside its extension headers has no transport header to mend. */
	headless = find_transport6(skb, &ip, at, &t);
	if (source && !headless && is_own(skb, &t, 1))
		return 1;
	if (bpf_skb_store_bytes(skb, at + (source ? 8 : 24), &c->to, sizeof(c->to), 0))
		return -1;
	if (bpf_l4_csum_replace(skb, outer->offset + 2, 0, c->diff, 0))
		return -1;
	if (headless)
		return 0;
	return fix_quoted_transport(skb, &t, c->diff, outer->offset + 2, 1);
}

static __always_inline __u32 slot4(struct __sk_buff *skb)
{
	return bpf_htonl(base4 + skb->tc_classid * step4);
}

static __always_inline int egress4(struct __sk_buff *skb)
{
	__u32 guest = guest4, slot = slot4(skb);
	struct transport t;
	struct ipv4 ip;
	__s64 diff;

	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || find_transport4(&ip, ETH_LEN, &t))
		return TC_ACT_SHOT;
	diff = bpf_csum_diff(&guest, sizeof(guest), &slot, sizeof(slot), 0);
	/* The quoted packet came in, so what was the slot's address in it is its destination. */
	if (t.protocol == PROTO_ICMP && fix_quote4(skb, &t, guest, slot, diff, 0))
		return TC_ACT_SHOT;
	if (!skb->ingress_ifindex && ip.source == slot)
		return TC_ACT_UNSPEC;
	if (ip.source != guest)
		return TC_ACT_SHOT;
	if (fix_transport(skb, &t, diff, 0) || bpf_l3_csum_replace(skb, ETH_LEN + 10, guest, slot, sizeof(slot)) ||
	    bpf_skb_store_bytes(skb, V4_SOURCE, &slot, sizeof(slot), 0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

static __always_inline int ingress4(struct __sk_buff *skb)
{
	__u32 guest = guest4, slot = slot4(skb);
	struct transport t;
	struct ipv4 ip;
	__s64 diff;
	int quote;

	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || find_transport4(&ip, ETH_LEN, &t))
		return TC_ACT_SHOT;
	if (ip.destination == guest)
		return TC_ACT_SHOT;
	if (ip.destination != slot || is_own(skb, &t, 0))
		return TC_ACT_UNSPEC;
	diff = bpf_csum_diff(&slot, sizeof(slot), &guest, sizeof(guest), 0);
	if (t.protocol == PROTO_ICMP && (quote = fix_quote4(skb, &t, slot, guest, diff, 1)))
		return quote < 0 ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	if (fix_transport(skb, &t, diff, 0) || bpf_l3_csum_replace(skb, ETH_LEN + 10, slot, guest, sizeof(guest)) ||
	    bpf_skb_store_bytes(skb, V4_DESTINATION, &guest, sizeof(guest), 0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

static __always_inline void load_change(struct __sk_buff *skb, struct change *c, int egress)
{
	struct in6 guest = {{guest6.word[0], guest6.word[1], guest6.word[2], guest6.word[3]}};
	__u64 number = skb->tc_classid;
	__u64 upper = bpf_cpu_to_be64(base6_upper + number * step6_upper);
	__u64 lower = bpf_cpu_to_be64(base6_lower + number * step6_lower);
	struct in6 slot = {{upper, upper >> 32, lower, lower >> 32}};

	c->from = egress ? guest : slot;
	c->to = egress ? slot : guest;
	c->diff = bpf_csum_diff(c->from.word, sizeof(c->from), c->to.word, sizeof(c->to), 0);
}

/* Router and neighbour discovery (types 133 to 137) belongs to the link, not to the guest. */
static __always_inline int is_discovery(struct __sk_buff *skb, const struct transport *t)
{
	__u8 type;

	if (t->protocol != PROTO_ICMPV6 || t->fragment || bpf_skb_load_bytes(skb, t->offset, &type, 1))
		return 0;
	return type >= 133 && type <= 137;
}

static __always_inline int egress6(struct __sk_buff *skb)
{
	struct transport t;
	struct change c;
	struct ipv6 ip;

	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || find_transport6(skb, &ip, ETH_LEN, &t))
		return TC_ACT_SHOT;
	if (!skb->ingress_ifindex && is_discovery(skb, &t))
		return TC_ACT_UNSPEC;
	load_change(skb, &c, 1);
	if (t.protocol == PROTO_ICMPV6 && fix_quote6(skb, &t, &c, 0))
		return TC_ACT_SHOT;
	if (!skb->ingress_ifindex && same6(&ip.source, &c.to))
		return TC_ACT_UNSPEC;
	if (!same6(&ip.source, &c.from))
		return TC_ACT_SHOT;
	if (fix_transport(skb, &t, c.diff, 1) || bpf_skb_store_bytes(skb, V6_SOURCE, &c.to, sizeof(c.to), 0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

static __always_inline int ingress6(struct __sk_buff *skb)
{
	struct transport t;
	struct change c;
	struct ipv6 ip;
	int quote;

	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || find_transport6(skb, &ip, ETH_LEN, &t))
		return TC_ACT_SHOT;
	load_change(skb, &c, 0);
	if (same6(&ip.destination, &c.to))
		return TC_ACT_SHOT;
	if (!same6(&ip.destination, &c.from) || is_discovery(skb, &t) || is_own(skb, &t, 0))
		return TC_ACT_UNSPEC;
	if (t.protocol == PROTO_ICMPV6 && (quote = fix_quote6(skb, &t, &c, 1)))
		return quote < 0 ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	if (fix_transport(skb, &t, c.diff, 1) || bpf_skb_store_bytes(skb, V6_DESTINATION, &c.to, sizeof(c.to), 0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

SEC("tc/egress")
int nat_egress(struct __sk_buff *skb)
{
	if (skb->protocol == ETH_IPV4)
		return egress4(skb);
	if (skb->protocol == ETH_IPV6)
		return egress6(skb);
	return TC_ACT_UNSPEC;
}

SEC("tc/ingress")
int nat_ingress(struct __sk_buff *skb)
{
	if (skb->protocol == ETH_IPV4)
		return ingress4(skb);
	if (skb->protocol == ETH_IPV6)
		return ingress6(skb);
	return TC_ACT_UNSPEC;
}
