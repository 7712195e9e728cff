// SPDX-License-Identifier: Apache-2.0
/* What netslot does not do, for `netslot bench skew --policy bpf` to compare with: one program on the host's
 * uplink for the packets of all tenants, which finds the tenant by the source address in a hash. */
#include "packet.h"

char gpl[] SEC("license") = "GPL";

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} tenants SEC(".maps");

SEC("tc/egress")
int find_tenant(struct __sk_buff *skb)
{
	__u32 address;

	if (skb->protocol != ETH_IPV4 || bpf_skb_load_bytes(skb, V4_SOURCE, &address, sizeof(address)))
		return TC_ACT_UNSPEC;
	return bpf_map_lookup_elem(&tenants, &address) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}
