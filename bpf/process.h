/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is told of a process, and filters by it. */
#ifndef EBPFSTREAM_PROCESS_H
#define EBPFSTREAM_PROCESS_H

#include "ebpfstream.h"

/* A process's number in its own pid namespace, and which that is. */
struct own_pid {
	u32 namespace;
	u32 number;
};

static __always_inline struct own_pid own_pid(struct task_struct *leader)
{
	struct own_pid own = {};
	struct pid *pid = 0;
	u32 level = 0;
	read_kernel(pid, leader->thread_pid);
	read_kernel(level, pid->level);
	/* The last of `numbers` is that of the innermost namespace (struct pid, include/linux/pid.h). */
	struct upid *innermost = (void *)pid + __builtin_offsetof(struct pid, numbers) + level * sizeof(struct upid);
	struct pid_namespace *namespace = 0;
	read_kernel(own.number, innermost->nr);
	read_kernel(namespace, innermost->ns);
	read_kernel(own.namespace, namespace->ns.inum);
	return own;
}

/* The process that is running, in numbers of the initial namespaces. */
struct who {
	u32 pid, ppid, tid;
	u64 uid_gid; /* the user in the lower half */
	struct task_struct *task, *parent; /* any thread of either process */
};

static __always_inline struct who who_runs(struct task_struct *task)
{
	struct who who = {};
	u64 pid_tgid = bpf_get_current_pid_tgid();
	who.pid = pid_tgid >> 32;
	who.tid = pid_tgid;
	who.uid_gid = bpf_get_current_uid_gid();
	who.task = task;
	/* As getppid(2) has it, kernel/sys.c: all threads have the same parent, any thread of it. */
	read_kernel(who.parent, task->real_parent);
	read_kernel(who.ppid, who.parent->tgid);
	return who;
}

static __always_inline struct task_struct *leader_of(struct task_struct *task)
{
	struct task_struct *leader = 0;
	read_kernel(leader, task->group_leader);
	return leader;
}

/* Written by user space in one piece; an event must meet all that `criteria` names.  As in filters.py. */
struct filters {
	u32 criteria;
	u32 pid, ppid, uid, gid;
	u32 cgroup_level;
	u64 cgroup_id;
	u64 comm[2];
	struct own_pid self;
};

#define FILTER_PID 1
#define FILTER_PPID 2
#define FILTER_UID 4
#define FILTER_GID 8
#define FILTER_COMM 16
#define FILTER_CGROUP 32
#define FILTER_SELF 64

static __always_inline bool same_process(struct own_pid one, struct own_pid other)
{
	return one.namespace == other.namespace && one.number == other.number;
}

static __always_inline bool passes(struct who *who)
{
	u32 key = 0;
	struct filters *filters = bpf_map_lookup_elem(MAP(FILTERS), &key);
	if (!filters || !filters->criteria)
		return true;
	u32 criteria = filters->criteria;
	if (criteria & FILTER_PID && who->pid != filters->pid)
		return false;
	if (criteria & FILTER_PPID && who->ppid != filters->ppid)
		return false;
	if (criteria & FILTER_UID && (u32)who->uid_gid != filters->uid)
		return false;
	if (criteria & FILTER_GID && who->uid_gid >> 32 != filters->gid)
		return false;
	if (criteria & FILTER_CGROUP &&
	    bpf_get_current_ancestor_cgroup_id(filters->cgroup_level) != filters->cgroup_id)
		return false;
	if (criteria & FILTER_COMM) {
		u64 comm[2] = {};
		bpf_probe_read_kernel_str(comm, sizeof(comm), who->task->comm);
		if (comm[0] != filters->comm[0] || comm[1] != filters->comm[1])
			return false;
	}
	if (criteria & FILTER_SELF &&
	    (same_process(own_pid(leader_of(who->task)), filters->self) ||
	     same_process(own_pid(leader_of(who->parent)), filters->self)))
		return false;
	return true;
}

#endif
