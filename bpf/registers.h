/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where a system call's arguments are, and whose numbers it goes by. */
#ifndef EBPFSTREAM_REGISTERS_H
#define EBPFSTREAM_REGISTERS_H

#include "ebpfstream.h"

/* syscall_get_arguments() and is_compat_task(), or in_ia32_syscall(), in arch/…/include/asm. */
#if defined(__x86_64__)
#define COMPAT_WORD(task) (task)->thread_info.status
#define COMPAT_BIT 0x0002 /* TS_COMPAT */
#elif defined(__aarch64__)
#define COMPAT_WORD(task) (task)->thread_info.flags
#define COMPAT_BIT (1UL << 22) /* TIF_32BIT */
#else
#error "the arguments of system calls are not read on this architecture yet"
#endif

/* All six, by as few reads as may be: each takes some 20 ns, however little it reads. */
static __always_inline void read_arguments(u64 *arguments, struct pt_regs *regs)
{
#if defined(__x86_64__)
	/* Neighbours in struct pt_regs, arch/x86/include/asm/ptrace.h. */
	struct {
		u64 r10, r9, r8, ax, cx, dx, si, di;
	} saved;
	_Static_assert(__builtin_offsetof(struct pt_regs, di) - __builtin_offsetof(struct pt_regs, r10) ==
			       sizeof(saved) - sizeof(saved.di),
		       "the registers are saved in another order");
	bpf_probe_read_kernel(&saved, sizeof(saved), &regs->r10);
	arguments[0] = saved.di;
	arguments[1] = saved.si;
	arguments[2] = saved.dx;
	arguments[3] = saved.r10;
	arguments[4] = saved.r8;
	arguments[5] = saved.r9;
#elif defined(__aarch64__)
	/* regs[0] holds the result at the end of the call. */
	read_kernel(arguments[0], regs->orig_x0);
	bpf_probe_read_kernel(arguments + 1, 5 * sizeof(*arguments), regs->regs + 1);
#endif
}

/* Whether the running call has a number of the 32-bit table. */
static __always_inline bool is_32_bit_call(struct task_struct *task)
{
	u64 word = 0;
	bpf_probe_read_kernel(&word, sizeof(COMPAT_WORD(task)), &COMPAT_WORD(task));
	return word & COMPAT_BIT;
}

#endif
