/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every successful execve(2) and execveat(2), from any thread; with -DFAILED those that fail as well.
 *
 * OVERHEAD: runs once for each exec, some microseconds.  Without FAILED nothing runs for any other
 * system call; with it every system call of the machine takes the slow way out (see the README).
 *
 * struct exec_event is generated from the Python class ExecEvent and stands before this text.
 */
#include "process.h"

#define FILENAME_ROOM 4096 /* PATH_MAX, include/uapi/linux/limits.h */
#define ARGS_ROOM 16384
#define CWD_ROOM 4096
#define NAME_ROOM 256 /* NAME_MAX and a NUL */
#define CWD_DEPTH 40

#define SUCCEEDED 0
#define EXECVE_FAILED 1
#define EXECVEAT_FAILED 2

struct scratch {
	struct exec_event event;
	/* One after the other; what is written last at a position of its own needs room behind it. */
	char tail[FILENAME_ROOM + ARGS_ROOM + CWD_ROOM + NAME_ROOM];
};
_Static_assert(sizeof(struct scratch) <= SCRATCH_SIZE, "an event does not fit into its scratch area");

/* The names of the working directory's path, from the innermost one, each with its NUL: the bytes written. */
static __always_inline u64 read_cwd(struct exec_event *event, char *to, struct task_struct *task)
{
	struct fs_struct *fs = 0;
	struct dentry *dentry = 0, *root_dentry = 0;
	struct vfsmount *vfsmount = 0, *root_vfsmount = 0;
	read_kernel(fs, task->fs);
	read_kernel(dentry, fs->pwd.dentry);
	read_kernel(vfsmount, fs->pwd.mnt);
	read_kernel(root_dentry, fs->root.dentry);
	read_kernel(root_vfsmount, fs->root.mnt);
	/* As prepend_path() goes, fs/d_path.c. */
	struct mount *mount = (void *)vfsmount - __builtin_offsetof(struct mount, mnt);
	/*
	 * In memory: of what is there the verifier remembers nothing, so that to it one pass of the loop is like the
	 * next, and it looks at one.  In a register there is another number in each: 198,000 instructions for 9,500.
	 */
	volatile u32 *written = &event->cwd_length;
	*written = 0;
	event->cwd_truncated = 1;
#pragma clang loop unroll(disable)
	for (int step = 0; step < CWD_DEPTH; step++) {
		struct dentry *mounted = 0, *parent = 0;
		if (dentry == root_dentry && (void *)mount + __builtin_offsetof(struct mount, mnt) == root_vfsmount) {
			event->cwd_truncated = 0;
			break;
		}
		read_kernel(mounted, mount->mnt.mnt_root);
		read_kernel(parent, dentry->d_parent);
		if (dentry == mounted || dentry == parent) {
			struct mount *outer = 0;
			read_kernel(outer, mount->mnt_parent);
			if (outer == mount) {
				event->cwd_truncated = 0;
				break;
			}
			read_kernel(dentry, mount->mnt_mountpoint);
			mount = outer;
			continue;
		}
		const unsigned char *name = 0;
		read_kernel(name, dentry->d_name.name);
		u64 length = *written;
		if (length >= CWD_ROOM - NAME_ROOM)
			break;
		asm volatile("%0 &= 4095" : "+r"(length)); /* for the verifier */
		long size = bpf_probe_read_kernel_str(to + length, NAME_ROOM, name);
		if (size > 0)
			*written = length + size;
		dentry = parent;
	}
	return *written;
}

static __always_inline u32 number_of(struct pid *pid)
{
	struct upid first = {};
	read_kernel(first, pid->numbers[0]);
	return first.nr;
}

/* What is told of the process whether or not its exec succeeded; false when a filter leaves it out. */
static __always_inline bool describe(struct exec_event *event, struct counters *counters, struct task_struct *task)
{
	struct who who = who_runs(task);
	if (!passes(&who)) {
		counters->rejected++;
		return false;
	}
	if (!admitted(counters))
		return false;
	stamp(event, counters);
	event->pid = who.pid;
	event->ppid = who.ppid;
	event->uid = who.uid_gid;
	event->gid = who.uid_gid >> 32;
	event->cgroup_id = bpf_get_current_cgroup_id();
	bpf_get_current_comm(&event->comm, sizeof(event->comm));
	struct task_struct *leader = leader_of(task);
	read_kernel(event->parent_comm, leader_of(who.parent)->comm);
	read_kernel(event->start_monotonic, leader->start_time);
	struct own_pid own = own_pid(leader);
	event->pid_namespace = own.namespace;
	event->namespace_pid = own.number;
	struct signal_struct *signal = 0;
	struct pid *session = 0;
	struct tty_struct *tty = 0;
	read_kernel(signal, task->signal);
	read_kernel(session, signal->pids[PIDTYPE_SID]);
	event->session = number_of(session);
	__builtin_memset(event->tty, 0, sizeof(event->tty));
	read_kernel(tty, signal->tty);
	if (tty)
		bpf_probe_read_kernel_str(event->tty, sizeof(event->tty), tty->name);
	return true;
}

/* The count includes the NUL, which what follows overwrites. */
#define LENGTH_WITHOUT_NUL(length, count, mask)                   \
	do {                                                      \
		(length) = (count) > 0 ? (count) - 1 : 0;         \
		asm volatile("%0 &= " #mask : "+r"(length));      \
	} while (0)

static __always_inline void finish(void *ctx, struct counters *counters, struct scratch *scratch,
				   struct task_struct *task, u64 filename_length, u64 args_length)
{
	struct exec_event *event = &scratch->event;
	event->filename_length = filename_length;
	event->args_length = args_length;
	u64 length = *(volatile u32 *)&event->filename_length + *(volatile u32 *)&event->args_length;
	asm volatile("" : "+r"(length)); /* keep the comparison where the verifier sees it */
	if (length > FILENAME_ROOM + ARGS_ROOM)
		length = 0;
	u64 cwd_length = read_cwd(event, scratch->tail + length, task);
	if (cwd_length > CWD_ROOM)
		cwd_length = 0;
	event->cwd_length = cwd_length;
	u64 size = sizeof(*event) + length + cwd_length;
	asm volatile("" : "+r"(size));
	if (size <= sizeof(*scratch))
		submit(ctx, counters, event, size);
	else
		counters->lost_too_large++;
}

/* TP_PROTO(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm), include/trace/events/sched.h */
int exec_succeeded(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct linux_binprm *bprm = (struct linux_binprm *)ctx->args[2];
	struct counters *counters = counters_of(SUCCEEDED);
	struct scratch *scratch = scratch_of(SUCCEEDED);
	if (!counters || !scratch)
		return 0;
	struct exec_event *event = &scratch->event;
	if (!describe(event, counters, task))
		return 0;
	event->program = SUCCEEDED;
	event->retval = 0;
	/* The thread that called exec had this number until it took over its leader's (de_thread(), fs/exec.c). */
	event->tid = ctx->args[1];
	const char *by_descriptor = 0;
	read_kernel(by_descriptor, bprm->fdpath);
	event->by_descriptor = by_descriptor != 0;

	const char *filename = 0;
	u64 filename_length = 0;
	read_kernel(filename, bprm->filename);
	long count = bpf_probe_read_kernel_str(scratch->tail, FILENAME_ROOM, filename);
	LENGTH_WITHOUT_NUL(filename_length, count, 4095);

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
	event->args_unreadable =
		size > ARGS_ROOM || bpf_probe_read_user(scratch->tail + filename_length, size, (void *)start) != 0;
	finish(ctx, counters, scratch, task, filename_length, event->args_unreadable ? 0 : size);
	return 0;
}

#ifdef FAILED

#include "registers.h"

#define ARG_CHUNK 4096
#define ARG_CHUNKS 1024
#define AT_FDCWD -100

/* events/syscalls/sys_exit_execve/format */
struct exit_record {
	u64 common;
	s64 number;
	s64 result;
};

/* The strings that argv points to, each with its NUL, one after the other: the bytes written. */
static __always_inline u64 read_argv(struct exec_event *event, char *to, const char **argv)
{
	volatile u32 *written = &event->args_length; /* as that of read_cwd() */
	*written = 0;
	const char *from = 0;
	event->args_truncated = 1;
	event->args_unreadable = 0;
	if (!argv) {
		event->args_truncated = 0;
		return 0;
	}
#pragma clang loop unroll(disable)
	for (int step = 0; step < ARG_CHUNKS; step++) {
		if (!from) {
			if (bpf_probe_read_user(&from, sizeof(from), argv++)) {
				event->args_unreadable = 1;
				event->args_truncated = 0;
				break;
			}
			if (!from) {
				event->args_truncated = 0;
				break;
			}
		}
		u64 length = *written;
		if (length >= ARGS_ROOM)
			break;
		asm volatile("%0 &= 16383" : "+r"(length)); /* for the verifier */
		long count = bpf_probe_read_user_str(to + length, ARG_CHUNK, from);
		if (count < 0) {
			event->args_unreadable = 1;
			event->args_truncated = 0;
			break;
		}
		if (!count) /* Linux 6.1's answer to an empty string (strncpy_from_user_nofault(), mm/maccess.c) */
			count = 1;
		count &= 2 * ARG_CHUNK - 1;
		if (count == ARG_CHUNK) { /* it may go on: the NUL is ours */
			from += ARG_CHUNK - 1;
			*written = length + ARG_CHUNK - 1;
		} else {
			from = 0;
			*written = length + count;
		}
	}
	return *written;
}

static __always_inline int failed(struct exit_record *ctx, u32 program, bool execveat)
{
	if (ctx->result >= 0)
		return 0;
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct counters *counters = counters_of(program);
	struct scratch *scratch = scratch_of(program);
	if (!counters || !scratch)
		return 0;
	struct exec_event *event = &scratch->event;
	if (!describe(event, counters, task))
		return 0;
	event->program = program;
	event->retval = ctx->result;
	event->tid = bpf_get_current_pid_tgid();
	/* The caller's registers, read at the end of the call: by now its pages have been faulted in. */
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf());
	u64 arguments[6];
	read_arguments(arguments, regs);
	u64 directory = execveat ? arguments[0] : AT_FDCWD;
	u64 path = arguments[execveat], argv = arguments[execveat + 1];
	u64 filename_length = 0;
	long count = bpf_probe_read_user_str(scratch->tail, FILENAME_ROOM, (void *)path);
	event->by_descriptor = (s32)directory != AT_FDCWD && count >= 0 && scratch->tail[0] != '/';
	LENGTH_WITHOUT_NUL(filename_length, count, 4095);
	u64 args_length = read_argv(event, scratch->tail + filename_length, (const char **)argv);
	event->args_size = args_length;
	asm volatile("" : "+r"(args_length));
	if (args_length > ARGS_ROOM) { /* the last piece went beyond, into what is written next */
		args_length = ARGS_ROOM;
		event->args_truncated = 1;
	}
	finish(ctx, counters, scratch, task, filename_length, args_length);
	return 0;
}

int execve_failed(struct exit_record *ctx)
{
	return failed(ctx, EXECVE_FAILED, false);
}

int execveat_failed(struct exit_record *ctx)
{
	return failed(ctx, EXECVEAT_FAILED, true);
}

#endif
