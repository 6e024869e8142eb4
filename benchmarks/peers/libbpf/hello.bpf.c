/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The same as ../hello.c, for libbpf: an event for each getppid(2) of one process. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include "event.h"

const volatile unsigned int target;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20); /* user space says how many */
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} perf SEC(".maps");

static __always_inline bool is_target(struct bpf_raw_tracepoint_args *ctx)
{
	return ctx->args[1] == GETPPID && bpf_get_current_pid_tgid() >> 32 == target;
}

static __always_inline void describe(struct event *event)
{
	u64 pid_tgid = bpf_get_current_pid_tgid(), uid_gid = bpf_get_current_uid_gid();
	event->monotonic = bpf_ktime_get_ns();
	event->pid = pid_tgid >> 32;
	event->tid = pid_tgid;
	event->uid = uid_gid;
	event->gid = uid_gid >> 32;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	__builtin_memcpy(event->message, "Hello World\0\0\0\0\0\0\0\0\0\0\0\0", sizeof(event->message));
}

SEC("raw_tp/sys_enter")
int to_ring(struct bpf_raw_tracepoint_args *ctx)
{
	if (!is_target(ctx))
		return 0;
	struct event *event = bpf_ringbuf_reserve(&ring, sizeof(*event), 0);
	if (!event)
		return 0;
	describe(event);
	bpf_ringbuf_submit(event, 0);
	return 0;
}

SEC("raw_tp/sys_enter")
int to_perf(struct bpf_raw_tracepoint_args *ctx)
{
	struct event event = {};
	if (!is_target(ctx))
		return 0;
	describe(&event);
	bpf_perf_event_output(ctx, &perf, BPF_F_CURRENT_CPU, &event, sizeof(event));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
