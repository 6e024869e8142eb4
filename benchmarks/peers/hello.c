/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What BCC and ebpfstream both load: an event for each getppid(2) of the process TARGET. */
struct event {
	u64 monotonic;
	u32 pid, tid, uid, gid;
	char comm[16];
	char message[24];
};

#ifdef PERF
BPF_PERF_OUTPUT(events);
#else
BPF_RINGBUF_OUTPUT(events, PAGES);
#endif

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

RAW_TRACEPOINT_PROBE(sys_enter)
{
	if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
		return 0;
#ifdef PERF
	struct event event = {};
	describe(&event);
	events.perf_submit(ctx, &event, sizeof(event));
#else
	struct event *event = events.ringbuf_reserve(sizeof(struct event));
	if (!event)
		return 0;
	describe(event);
	events.ringbuf_submit(event, 0);
#endif
	return 0;
}
