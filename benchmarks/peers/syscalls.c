/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What trace_syscalls() tells of a call when it begins, by BCC: each getppid(2) of the process TARGET. */
#include <linux/sched.h>

struct event {
	u64 monotonic;
	u64 arguments[6];
	u32 pid, tid, uid, gid, ppid, cpu, number;
	char comm[16];
};

#ifdef PERF
BPF_PERF_OUTPUT(events);
BPF_PERCPU_ARRAY(scratch, struct event, 1);
#else
BPF_RINGBUF_OUTPUT(events, PAGES);
#endif

static __always_inline void describe(struct event *event, struct bpf_raw_tracepoint_args *ctx)
{
	struct pt_regs regs;
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	u64 pid_tgid = bpf_get_current_pid_tgid(), uid_gid = bpf_get_current_uid_gid();
	event->monotonic = bpf_ktime_get_ns();
	event->pid = pid_tgid >> 32;
	event->tid = pid_tgid;
	event->uid = uid_gid;
	event->gid = uid_gid >> 32;
	event->ppid = task->real_parent->tgid;
	event->cpu = bpf_get_smp_processor_id();
	event->number = ctx->args[1];
	bpf_probe_read_kernel(&regs, sizeof(regs), (void *)ctx->args[0]);
#if defined(__x86_64__)
	event->arguments[0] = regs.di;
	event->arguments[1] = regs.si;
	event->arguments[2] = regs.dx;
	event->arguments[3] = regs.r10;
	event->arguments[4] = regs.r8;
	event->arguments[5] = regs.r9;
#else
	__builtin_memcpy(event->arguments, regs.regs, sizeof(event->arguments));
#endif
	bpf_get_current_comm(event->comm, sizeof(event->comm));
}

RAW_TRACEPOINT_PROBE(sys_enter)
{
	if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
		return 0;
#ifdef PERF
	int zero = 0;
	struct event *event = scratch.lookup(&zero);
	if (!event)
		return 0;
	describe(event, ctx);
	events.perf_submit(ctx, event, sizeof(*event));
#else
	struct event *event = events.ringbuf_reserve(sizeof(struct event));
	if (!event)
		return 0;
	describe(event, ctx);
	events.ringbuf_submit(event, 0);
#endif
	return 0;
}
