/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How many execs have succeeded, by real user: COUNTS has a number for each on each CPU.
 *
 * OVERHEAD: less than a microsecond for each exec; nothing runs otherwise.
 */
#include "process.h"

/* TP_PROTO(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm), include/trace/events/sched.h */
int exec_counted(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = counters_of(0);
	struct who who = who_runs((struct task_struct *)ctx->args[0]);
	if (!counters)
		return 0;
	if (!passes(&who)) {
		counters->rejected++;
		return 0;
	}
	counters->tried++;
	u32 uid = who.uid_gid;
	u64 *count = bpf_map_lookup_elem(MAP(COUNTS), &uid);
	if (!count) {
		/* Another CPU may be adding this user at the same time; whichever comes second finds it there. */
		u64 none = 0;
		bpf_map_update_elem(MAP(COUNTS), &uid, &none, BPF_NOEXIST);
		count = bpf_map_lookup_elem(MAP(COUNTS), &uid);
	}
	if (count) {
		*count += 1;
		counters->submitted++;
	} else {
		counters->lost_full++;
	}
	return 0;
}
