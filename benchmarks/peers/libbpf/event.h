/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
struct event {
	unsigned long long monotonic;
	unsigned int pid, tid, uid, gid;
	char comm[16];
	char message[24];
};
