// SPDX-License-Identifier: Apache-2.0
/* Counters of packets and bytes by direction and verdict, one map per slot.
 *
 * `seen` programs run before all others on a hook and `passed` programs after them; what was dropped between
 * them is the difference. They judge nothing.
 */
#include "packet.h"

char gpl[] SEC("license") = "GPL";

enum { EGRESS_SEEN, EGRESS_PASSED, INGRESS_SEEN, INGRESS_PASSED, CELLS };

struct cell {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CELLS);
	__type(key, __u32);
	__type(value, struct cell);
} counters SEC(".maps");

static __always_inline int count(struct __sk_buff *skb, __u32 index)
{
	struct cell *cell = bpf_map_lookup_elem(&counters, &index);

	if (cell) {
		cell->packets += skb->gso_segs ? skb->gso_segs : 1;
		cell->bytes += skb->len;
	}
	return TC_ACT_UNSPEC;
}

SEC("tc/egress")
int egress_seen(struct __sk_buff *skb)
{
	return count(skb, EGRESS_SEEN);
}

SEC("tc/egress")
int egress_passed(struct __sk_buff *skb)
{
	return count(skb, EGRESS_PASSED);
}

SEC("tc/ingress")
int ingress_seen(struct __sk_buff *skb)
{
	return count(skb, INGRESS_SEEN);
}

SEC("tc/ingress")
int ingress_passed(struct __sk_buff *skb)
{
	return count(skb, INGRESS_PASSED);
}
