// SPDX-License-Identifier: Apache-2.0
/* Egress filter of destinations and ports. The longest prefix that holds the destination decides:
 *
 *   DROP    never
 *   ACCEPT  any protocol and port
 *   PORTS   what `ports` holds: TCP and UDP by destination port, other protocols with port 0
 *
 * A table is the list of prefixes flattened to ranges in ascending order, behind an index of equal buckets of
 * the address space, so that a look-up costs the same in a list of ten and of 100,000. In units of 8 bytes:
 *
 *   [0] start of the first bucket (IPv6: its upper half)    [1] bits to shift by << 32 | number of buckets
 *   [2..] for each bucket, the half-length of the search in it << 32 | the last range that starts before it;
 *         then the number of the last range
 *   then the ranges: IPv4 start << 32 | verdict; IPv6 upper half, lower half, verdict; and as many of all ones
 *   behind them as the longest search can probe beyond the end
 *
 * A slot's lists never change in place: filled maps and this program over them take the old program's place.
 */
#include "packet.h"

char gpl[] SEC("license") = "GPL";

enum { DROP, ACCEPT, PORTS };

#define HEAD 2
#define STEPS 20 /* a million ranges in one bucket */

struct service {
	__u8 protocol;
	__u8 unused;
	__u16 port;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} table4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} table6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct service);
	__type(value, __u32);
} ports SEC(".maps");

/* Where the ranges begin in a table, the last of them known to start at or below the address, and the first
 * step of the search from there. */
struct search {
	__u32 ranges;
	__u32 low;
	__u32 step;
};

static __always_inline __u64 *cell(void *table, __u32 index)
{
	return bpf_map_lookup_elem(table, &index);
}

static __always_inline int begin(void *table, __u64 address, struct search *s)
{
	__u64 *base = cell(table, 0), *shape = cell(table, 1), *place, bucket;
	__u32 buckets;

	if (!base || !shape)
		return -1;
	buckets = *shape;
	s->ranges = HEAD + buckets + 1;
	s->low = s->step = 0;
	if (address < *base)
		return 0;
	bucket = (address - *base) >> ((*shape >> 32) & 63);
	place = cell(table, HEAD + (bucket < buckets ? bucket : buckets));
	if (!place)
		return -1;
	s->low = *place;
	s->step = *place >> 32;
	return 0;
}

/* 1 where a <= b. Without a branch, as each in the loops below doubles what the verifier walks; so a probe
 * outside the table, which only a damaged one leads to, must end the search there and then. */
static __always_inline __u64 not_above(__u64 a, __u64 b)
{
	return 1 ^ (((~b & a) | ((~b | a) & (b - a))) >> 63);
}

static __always_inline __u32 verdict4(__u32 address)
{
	struct search s;
	__u64 *range;

	if (begin(&table4, address, &s))
		return DROP;
	for (int i = 0; i < STEPS && s.step; i++) {
		range = cell(&table4, s.ranges + s.low + s.step);
		if (!range)
			return DROP;
		s.low += s.step * not_above(*range >> 32, address);
		s.step >>= 1;
	}
	range = cell(&table4, s.ranges + s.low);
	return range ? *range : DROP;
}

static __always_inline __u32 verdict6(__u64 upper, __u64 lower)
{
	__u64 *start, *more, below, equal;
	struct search s;

	if (begin(&table6, upper, &s))
		return DROP;
	for (int i = 0; i < STEPS && s.step; i++) {
		start = cell(&table6, s.ranges + (s.low + s.step) * 3);
		if (!start)
			return DROP;
		more = cell(&table6, s.ranges + (s.low + s.step) * 3 + 1);
		if (!more)
			return DROP;
		below = not_above(*start, upper);
		equal = below & not_above(upper, *start);
		s.low += s.step * (below ^ (equal & (1 ^ not_above(*more, lower))));
		s.step >>= 1;
	}
	start = cell(&table6, s.ranges + s.low * 3 + 2);
	return start ? *start : DROP;
}

static __always_inline int port_allowed(struct __sk_buff *skb)
{
	__u32 transport = skb->cb[0];
	struct service service = {.protocol = transport >> 16};

	/* Without its first fragment, whose ports were judged, a later one is of no use to anybody. */
	if (transport >> 24 == 2)
		return 1;
	if (service.protocol == PROTO_TCP || service.protocol == PROTO_UDP) {
		if (bpf_skb_load_bytes(skb, (transport & 0xffff) + 2, &service.port, sizeof(service.port)))
			return 0;
	}
	return bpf_map_lookup_elem(&ports, &service) != 0;
}

/* Neighbour solicitations and advertisements of this link (hop limit 255: none was forwarded). */
static __always_inline int is_neighbour_discovery(struct __sk_buff *skb)
{
	__u8 hops, type;

	if (skb->cb[0] >> 16 != PROTO_ICMPV6 || bpf_skb_load_bytes(skb, ETH_LEN + 7, &hops, 1) || hops != 255)
		return 0;
	return !bpf_skb_load_bytes(skb, skb->cb[0] & 0xffff, &type, 1) && (type == 135 || type == 136);
}

static __always_inline int act(struct __sk_buff *skb, __u32 verdict)
{
	if (verdict == ACCEPT || (verdict == PORTS && port_allowed(skb)))
		return TC_ACT_UNSPEC;
	return TC_ACT_SHOT;
}

SEC("tc/egress")
int filter4(struct __sk_buff *skb)
{
	__u32 address;

	if (skb->protocol != ETH_IPV4)
		return TC_ACT_UNSPEC;
	if (bpf_skb_load_bytes(skb, V4_DESTINATION, &address, sizeof(address)))
		return TC_ACT_SHOT;
	return act(skb, verdict4(bpf_ntohl(address)));
}

SEC("tc/egress")
int filter6(struct __sk_buff *skb)
{
	__u64 address[2];

	if (skb->protocol != ETH_IPV6 || is_neighbour_discovery(skb))
		return TC_ACT_UNSPEC;
	if (bpf_skb_load_bytes(skb, V6_DESTINATION, address, sizeof(address)))
		return TC_ACT_SHOT;
	return act(skb, verdict6(bpf_be64_to_cpu(address[0]), bpf_be64_to_cpu(address[1])));
}
