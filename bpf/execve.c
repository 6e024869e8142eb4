/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every successful execve(2) and execveat(2), from any thread.
 *
 * OVERHEAD: runs once for each exec, some microseconds; nothing runs for any other system call.
 *
 * struct exec_event is generated from the Python class ExecEvent and stands before this text.
 */
#include "ebpfstream.h"

#define FILENAME_ROOM 4096 /* PATH_MAX, include/uapi/linux/limits.h */
#define ARGS_ROOM 16384

struct scratch {
	struct exec_event event;
	char tail[FILENAME_ROOM + ARGS_ROOM];
};
_Static_assert(sizeof(struct scratch) <= SCRATCH_SIZE, "an event does not fit into its scratch area");

#define read_kernel(to, from) bpf_probe_read_kernel(&(to), sizeof(to), &(from))

/* TP_PROTO(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm), include/trace/events/sched.h */
int exec_succeeded(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct linux_binprm *bprm = (struct linux_binprm *)ctx->args[2];
	struct counters *counters = counters_of(0);
	struct scratch *scratch = scratch_of(0);
	if (!counters || !scratch)
		return 0;
	struct exec_event *event = &scratch->event;
	stamp(event, counters);

	event->pid = bpf_get_current_pid_tgid() >> 32;
	/* The thread that called exec had this number until it took over its leader's (de_thread(), fs/exec.c). */
	event->tid = ctx->args[1];
	u64 ids = bpf_get_current_uid_gid();
	event->uid = ids;
	event->gid = ids >> 32;
	struct task_struct *parent = 0;
	read_kernel(parent, task->real_parent);
	read_kernel(event->ppid, parent->tgid);
	event->cgroup_id = bpf_get_current_cgroup_id();
	bpf_get_current_comm(&event->comm, sizeof(event->comm));

	const char *filename = 0;
	read_kernel(filename, bprm->filename);
	long length = bpf_probe_read_kernel_str(scratch->tail, FILENAME_ROOM, filename);
	/* The count includes the NUL, which the arguments overwrite. */
	u64 filename_length = length > 0 ? length - 1 : 0;
	asm volatile("%0 &= 4095" : "+r"(filename_length)); /* for the verifier: below FILENAME_ROOM */
	event->filename_length = filename_length;

	/* The new program's own argument area, as the kernel laid it out: a script's has the interpreter's. */
	struct mm_struct *mm = 0;
	u64 start = 0, end = 0;
	read_kernel(mm, task->mm);
	read_kernel(start, mm->arg_start);
	read_kernel(end, mm->arg_end);
	u64 size = end - start;
	event->args_size = size;
	event->args_truncated = size > ARGS_ROOM;
	if (size > ARGS_ROOM)
		size = ARGS_ROOM;
	asm volatile("" : "+r"(size)); /* keep the comparison where the verifier sees it */
	if (size > ARGS_ROOM || bpf_probe_read_user(scratch->tail + filename_length, size, (void *)start))
		size = 0;
	event->args_length = size;

	submit(counters, event, sizeof(*event) + filename_length + size);
	return 0;
}
