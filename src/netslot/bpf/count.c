// SPDX-License-Identifier: Apache-2.0
/* Counters of packets and bytes by direction and verdict.
 *
 * One program stands before all others on each hook and behind them; the class id of each attachment says which
 * slot it is of and, in its last two bits, where it stands. What was dropped between the two is the difference. It judges nothing.
 * A map holds the counters of GROUP slots whose numbers are next to each other, so that a program is loaded for
 * each group and not for each slot. The cells of a direction lie as far apart as cache lines do.
 */
#include "packet.h"

char gpl[] SEC("license") = "GPL";

#define GROUP 64

struct cell {
	__u64 packets;
	__u64 bytes;
};

struct direction {
	struct cell seen;
	struct cell passed;
	__u64 unused[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, GROUP * 2);
	__type(key, __u32);
	__type(value, struct direction);
} counters SEC(".maps");

SEC("tc")
int count(struct __sk_buff *skb)
{
	__u32 id = skb->tc_classid, index = (id >> 2) % GROUP << 1 | ((id >> 1) & 1);
	struct direction *direction = bpf_map_lookup_elem(&counters, &index);
	struct cell *cell;

	if (!direction)
		return TC_ACT_UNSPEC;
	cell = id & 1 ? &direction->passed : &direction->seen;
	__sync_fetch_and_add(&cell->packets, skb->gso_segs ? skb->gso_segs : 1);
	__sync_fetch_and_add(&cell->bytes, skb->len);
	return TC_ACT_UNSPEC;
}
