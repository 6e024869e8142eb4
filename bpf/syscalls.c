/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * System calls whose numbers have a program in CALLS, each when it is entered or when it has returned.
 *
 * OVERHEAD: every system call of every process takes the kernel's slow way in and out, and runs a program
 * that ends at once unless the call is a chosen one: some 50 ns (getppid: 390 without), or 160 ns where
 * results are asked for, which runs another one at every exit.  A chosen call costs some 430 ns, 830 with
 * its result, 220 if a filter leaves it out; a perf buffer adds an interrupt to it, microseconds.
 *
 * struct syscall_event is generated from the Python class SyscallEvent and stands before this text.
 */
#include "process.h"
#include "registers.h"

#define ENTERED 0
#define REMEMBERED 1
#define RETURNED 2
#define ENDED 3

/* Whether the call that begins is to be told of; counted if not. */
static __always_inline bool wanted(struct who *who, struct counters *counters)
{
	if (passes(who) && !is_32_bit_call(who->task))
		return true;
	counters->rejected++;
	return false;
}

/* What is known at the entry, all but when. */
static __always_inline void describe(struct syscall_event *event, struct who *who, struct bpf_raw_tracepoint_args *ctx)
{
	__builtin_memset(event, 0, sizeof(*event));
	event->pid = who->pid;
	event->ppid = who->ppid;
	event->tid = who->tid;
	event->uid = who->uid_gid;
	event->gid = who->uid_gid >> 32;
	/* The same as bpf_get_current_comm(), which takes twice as long. */
	bpf_probe_read_kernel_str(event->comm, sizeof(event->comm), who->task->comm);
	event->number = ctx->args[1];
	read_arguments(event->arguments, (struct pt_regs *)ctx->args[0]);
}

/* TP_PROTO(struct pt_regs *regs, long id), include/trace/events/syscalls.h */
int dispatched(struct bpf_raw_tracepoint_args *ctx)
{
	/* Numbers that are not in the table, x32's and -1 among them, call nothing. */
	bpf_tail_call_((u64)MAP(CALLS), ctx, ctx->args[1]);
	return 0;
}

/* Called for calls of which the entry is all that is wanted, or all that there is. */
int entered(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = counters_of(ENTERED);
	struct who who = who_runs((struct task_struct *)bpf_get_current_task());
	if (!counters || !wanted(&who, counters) || !admitted(counters))
		return 0;
	struct syscall_event event;
	describe(&event, &who, ctx);
	event.program = ENTERED;
	stamp(&event, counters);
	submit(ctx, counters, &event, sizeof(event));
	return 0;
}

/*
 * Called for the others.  They are known by their task, not by its number, which becomes another one
 * when a thread that is not the leader executes a program (de_thread(), fs/exec.c).
 */
int remembered(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = counters_of(REMEMBERED);
	struct who who = who_runs((struct task_struct *)bpf_get_current_task());
	struct syscall_event event;
	if (!counters || !wanted(&who, counters))
		return 0;
	describe(&event, &who, ctx);
	event.monotonic = bpf_ktime_get_ns();
	u64 task = (u64)who.task;
	if (bpf_map_update_elem(MAP(PENDING), &task, &event, BPF_ANY)) {
		counters->tried++;
		counters->sequence++;
		counters->lost_full++;
	}
	return 0;
}

/* Submit the call that this task is remembered to be in, if it is. */
static __always_inline void finish(struct bpf_raw_tracepoint_args *ctx, u32 program, bool returned)
{
	u64 task = bpf_get_current_task();
	struct syscall_event *event = bpf_map_lookup_elem(MAP(PENDING), &task);
	if (!event)
		return;
	struct counters *counters = counters_of(program);
	if (!counters)
		return;
	if (!admitted(counters)) {
		bpf_map_delete_elem(MAP(PENDING), &task);
		return;
	}
	u64 began = event->monotonic;
	stamp(event, counters);
	u64 duration = event->monotonic - began;
	event->monotonic = began;
	event->program = program;
	if (returned) {
		/* TP_PROTO(struct pt_regs *regs, long ret), include/trace/events/syscalls.h */
		u64 result = ctx->args[1];
		__builtin_memcpy(event->result, &result, sizeof(result));
		__builtin_memcpy(event->duration, &duration, sizeof(duration));
		event->result[8] = event->duration[8] = 1;
	}
	submit(ctx, counters, event, sizeof(*event));
	bpf_map_delete_elem(MAP(PENDING), &task);
}

/* No other exit can come between an entry and its own: a new task's first exit has a task of its own. */
int returned(struct bpf_raw_tracepoint_args *ctx)
{
	finish(ctx, RETURNED, true);
	return 0;
}

/* A thread that ends within a call: reboot(2) in a container does that (reboot_pid_ns()). */
int ended(struct bpf_raw_tracepoint_args *ctx)
{
	finish(ctx, ENDED, false);
	return 0;
}
