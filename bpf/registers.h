/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where a system call's arguments are, and whose numbers it goes by. */
#ifndef EBPFSTREAM_REGISTERS_H
#define EBPFSTREAM_REGISTERS_H

#include "ebpfstream.h"

/* syscall_get_arguments() and is_compat_task(), or in_ia32_syscall(), in arch/…/include/asm. */
#if defined(__x86_64__)
#define ARGUMENT_0(regs) (regs)->di
#define ARGUMENT_1(regs) (regs)->si
#define ARGUMENT_2(regs) (regs)->dx
#define ARGUMENT_3(regs) (regs)->r10
#define ARGUMENT_4(regs) (regs)->r8
#define ARGUMENT_5(regs) (regs)->r9
#define COMPAT_WORD(task) (task)->thread_info.status
#define COMPAT_BIT 0x0002 /* TS_COMPAT */
#elif defined(__aarch64__)
#define ARGUMENT_0(regs) (regs)->orig_x0 /* regs[0] holds the result at the end of the call */
#define ARGUMENT_1(regs) (regs)->regs[1]
#define ARGUMENT_2(regs) (regs)->regs[2]
#define ARGUMENT_3(regs) (regs)->regs[3]
#define ARGUMENT_4(regs) (regs)->regs[4]
#define ARGUMENT_5(regs) (regs)->regs[5]
#define COMPAT_WORD(task) (task)->thread_info.flags
#define COMPAT_BIT (1UL << 22) /* TIF_32BIT */
#else
#error "the arguments of system calls are not read on this architecture yet"
#endif

/* Whether the running call has a number of the 32-bit table. */
static __always_inline bool is_32_bit_call(struct task_struct *task)
{
	u64 word = 0;
	bpf_probe_read_kernel(&word, sizeof(COMPAT_WORD(task)), &COMPAT_WORD(task));
	return word & COMPAT_BIT;
}

#endif
