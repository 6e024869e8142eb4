/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is executed, in the way of BCC's execsnoop, at tracepoints: a record for each argument, one for the return. */
#include <linux/sched.h>

#define MOST_ARGUMENTS 20
#define ARGUMENT 0
#define RETURN 1

struct event {
	u64 monotonic, cgroup_id;
	u32 kind, pid, tid, ppid, uid, gid;
	int retval;
	char comm[16];
	char argument[128];
};

BPF_PERF_OUTPUT(events);

static __always_inline void describe(struct event *event)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	u64 pid_tgid = bpf_get_current_pid_tgid(), uid_gid = bpf_get_current_uid_gid();
	event->monotonic = bpf_ktime_get_ns();
	event->cgroup_id = bpf_get_current_cgroup_id();
	event->pid = pid_tgid >> 32;
	event->tid = pid_tgid;
	event->ppid = task->real_parent->tgid;
	event->uid = uid_gid;
	event->gid = uid_gid >> 32;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
}

TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
	struct event event = {.kind = ARGUMENT};
	describe(&event);
	bpf_probe_read_user_str(event.argument, sizeof(event.argument), args->filename);
	events.perf_submit(args, &event, sizeof(event));
#pragma unroll
	for (int number = 0; number < MOST_ARGUMENTS; number++) {
		const char *argument = 0;
		bpf_probe_read_user(&argument, sizeof(argument), &args->argv[number]);
		if (!argument)
			return 0;
		bpf_probe_read_user_str(event.argument, sizeof(event.argument), argument);
		events.perf_submit(args, &event, sizeof(event));
	}
	return 0;
}

TRACEPOINT_PROBE(syscalls, sys_exit_execve)
{
	struct event event = {.kind = RETURN, .retval = args->ret};
	describe(&event);
	events.perf_submit(args, &event, sizeof(event));
	return 0;
}
