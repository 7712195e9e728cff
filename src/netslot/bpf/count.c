// SPDX-License-Identifier: Apache-2.0
/* Counters of packets and bytes by direction and verdict, one map per slot.
 *
 * One program stands before all others on each hook and behind them; the class id of each attachment says which
 * cell it counts in. What was dropped between the two is the difference. It judges nothing.
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

SEC("tc")
int count(struct __sk_buff *skb)
{
	__u32 index = skb->tc_classid;
	struct cell *cell = bpf_map_lookup_elem(&counters, &index);

	if (cell) {
		cell->packets += skb->gso_segs ? skb->gso_segs : 1;
		cell->bytes += skb->len;
	}
	return TC_ACT_UNSPEC;
}
