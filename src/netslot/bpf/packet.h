/* SPDX-License-Identifier: Apache-2.0 */
/* What the programs share: the few header layouts they read, and the values that a slot's stub hands on.
 *
 * Headers are read with bpf_skb_load_bytes rather than by direct access: it works on any skb, linear or not,
 * and keeps the verifier's work small.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ETH_LEN 14
#define ETH_IPV4 bpf_htons(0x0800)
#define ETH_IPV6 bpf_htons(0x86dd)

#define PROTO_HOPOPTS 0
#define PROTO_ICMP 1
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_DCCP 33
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_AUTH 51
#define PROTO_ICMPV6 58
#define PROTO_DSTOPTS 60
#define PROTO_UDPLITE 136

struct in6 {
	__u32 word[4];
};

struct ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__u16 length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__u32 source;
	__u32 destination;
};

struct ipv6 {
	__u32 flow;
	__u16 length;
	__u8 next;
	__u8 hops;
	struct in6 source;
	struct in6 destination;
};

#define V4_SOURCE (ETH_LEN + 12)
#define V4_DESTINATION (ETH_LEN + 16)
#define V6_SOURCE (ETH_LEN + 8)
#define V6_DESTINATION (ETH_LEN + 24)

#define FRAGMENT_OFFSET bpf_htons(0x1fff)
#define FRAGMENT_MORE bpf_htons(0x2000)

static __always_inline int same6(const struct in6 *a, const struct in6 *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

/* Where a packet's transport header is. `fragment` is 0 for a whole packet, 1 for a first fragment,
 * 2 for a later one, which has no transport header. */
struct transport {
	__u32 offset;
	__u8 protocol;
	__u8 fragment;
};

static __always_inline int find_transport4(const struct ipv4 *ip, __u32 at, struct transport *t)
{
	__u32 words = ip->version_ihl & 0x0f;

	if (words < 5)
		return -1;
	t->offset = at + words * 4;
	t->protocol = ip->protocol;
	t->fragment = ip->fragment & FRAGMENT_OFFSET ? 2 : ip->fragment & FRAGMENT_MORE ? 1 : 0;
	return 0;
}

/* Walks at most six extension headers. Returns -1 for more of them, for a truncated one, and for a routing
 * header, which would make the transport checksum that of another destination. */
static __always_inline int find_transport6(struct __sk_buff *skb, const struct ipv6 *ip, __u32 at, struct transport *t)
{
	__u8 next = ip->next;
	__u32 offset = at + sizeof(*ip);

	t->fragment = 0;
	for (int i = 0; i < 7; i++) {
		__u8 head[4];

		if (next != PROTO_HOPOPTS && next != PROTO_DSTOPTS && next != PROTO_FRAGMENT && next != PROTO_ROUTING) {
			t->offset = offset;
			t->protocol = next;
			return 0;
		}
		if (next == PROTO_ROUTING || bpf_skb_load_bytes(skb, offset, head, sizeof(head)))
			return -1;
		if (next == PROTO_FRAGMENT) {
			if (head[2] || head[3] & 0xf8) {
				t->fragment = 2;
				t->offset = offset + 8;
				t->protocol = head[0];
				return 0;
			}
			t->fragment = head[3] & 1;
			offset += 8;
		} else {
			offset += (head[1] + 1) * 8;
		}
		next = head[0];
	}
	return -1;
}
