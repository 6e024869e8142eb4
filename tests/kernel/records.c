/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Records of 16 bytes to 8 KiB for each getppid(2) of the process TARGET, reserved and then filled, copied
 * in one call, or withdrawn.  The first and the last 8 bytes are the CPU and a sequence number of its own. */
#include "ebpfstream.h"

#if defined(__x86_64__)
#define GETPPID 110
#elif defined(__aarch64__)
#define GETPPID 173
#endif

#define RESERVED(size)                                                                \
	do {                                                                          \
		u64 *record = bpf_ringbuf_reserve(MAP(OUTPUT), size, 0);              \
		if (!record) {                                                        \
			counters->lost_full++;                                             \
			break;                                                        \
		}                                                                     \
		record[0] = tag;                                                      \
		/* Something slow in between keeps the record unfinished for a while. */ \
		bpf_get_current_comm(scratch, 16);                                    \
		record[(size) / 8 - 1] = tag;                                         \
		bpf_ringbuf_submit(record, 0);                                        \
		counters->submitted++;                                                \
	} while (0)

int records(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
		return 0;
	struct counters *counters = counters_of(0);
	char *scratch = scratch_of(0);
	if (!counters || !scratch)
		return 0;
	u64 sequence = counters->tried++;
	u64 tag = (u64)bpf_get_smp_processor_id() << 48 | sequence;
	/* Stretches of one kind, so that runs of equal records and changes between them both occur. */
	switch (sequence >> 4 & 7) {
	case 0:
		RESERVED(16);
		break;
	case 1:
		RESERVED(72);
		break;
	case 2:
		if (sequence & 1)
			RESERVED(8192);
		else
			RESERVED(24);
		break;
	case 3: {
		u64 *record = bpf_ringbuf_reserve(MAP(OUTPUT), 40, 0);
		if (!record) {
			counters->lost_full++;
			break;
		}
		record[0] = ~0ULL;
		bpf_ringbuf_discard(record, 0);
		counters->submitted++;
		break;
	}
	default: {
		u64 size = 16 + (sequence * 2654435761u >> 7 & 0x3ff);
		*(u64 *)scratch = tag;
		__builtin_memcpy(scratch + size - 8, &tag, 8);
		submit(ctx, counters, scratch, size);
	}
	}
	return 0;
}
