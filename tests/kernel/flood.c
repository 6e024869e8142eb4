/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* One event for each getppid(2) of the process TARGET: the sequence number at both ends of a payload
 * whose length follows from the number, as tests/kernel/flood.py works it out too. */
#include "ebpfstream.h"

#if defined(__x86_64__)
#define GETPPID 110
#elif defined(__aarch64__)
#define GETPPID 173
#endif

struct scratch {
	struct flood_event event;
	char payload[8192];
};

int flood(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
		return 0;
	struct counters *counters = counters_of(0);
	struct scratch *scratch = scratch_of(0);
	if (!counters || !scratch)
		return 0;
	struct flood_event *event = &scratch->event;
	if (!admitted(counters))
		return 0;
	event->program = 0;
	stamp(event, counters);
	u64 length = LENGTH(event->sequence);
	event->payload_length = length;
	asm volatile("%0 &= 8191" : "+r"(length));
	if (length >= 8)
		__builtin_memcpy(scratch->payload + length - 8, &event->sequence, 8);
	submit(ctx, counters, event, sizeof(*event) + length);
	return 0;
}
