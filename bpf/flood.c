/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * For measuring buffers: an event of as many bytes as the type has for each getppid(2) of the process FIRST or SECOND.
 *
 * WAKE_EVERY=n lets a ring buffer wake its reader for one event in n of each CPU; without it, or with a
 * perf buffer, that is left to the kernel.
 *
 * OVERHEAD: every system call of every process, while it is measured.
 */
#ifdef WAKE_EVERY
#define WAKEUP (counters->sequence % WAKE_EVERY ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP)
#endif
#include "ebpfstream.h"

#if defined(__x86_64__)
#define GETPPID 110
#elif defined(__aarch64__)
#define GETPPID 173
#else
#error "the number of getppid(2) is not known here for this architecture yet"
#endif

int flood(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] != GETPPID)
		return 0;
	u32 process = bpf_get_current_pid_tgid() >> 32;
	if (process != FIRST && process != SECOND)
		return 0;
	struct counters *counters = counters_of(0);
	struct flood_event *event = scratch_of(0);
	if (!counters || !event || !admitted(counters))
		return 0;
	counters->sequence++;
	event->monotonic = bpf_ktime_get_ns();
	submit(ctx, counters, event, sizeof(*event));
	return 0;
}
