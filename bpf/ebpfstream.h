/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How a ready-made program hands an event over, and how it is accounted for.
 *
 * The maps are made by user space, which gives each a number (-DOUTPUT=…) and puts the map in the
 * number's place when it loads the program.  An event is put together in a scratch area, because
 * its length is not known beforehand and it does not fit on the stack.
 *
 * Each program has a number of its own, and with it counters and a scratch area on each CPU, of which
 * it is the only writer: the kernel does not run it again on a CPU where it is running already (the
 * recursion check in __bpf_trace_run(), kernel/trace/bpf_trace.c).  So plain additions are exact, and
 * sequence numbers are in the order of submission.
 */
#ifndef EBPFSTREAM_H
#define EBPFSTREAM_H

#define MAP(number) ((void *)bpf_pseudo_fd(1, number))

#define SCRATCH_SIZE 32768 /* the largest value of a per-CPU array: PCPU_MIN_UNIT_SIZE, mm/percpu.c */

#define read_kernel(to, from) bpf_probe_read_kernel(&(to), sizeof(to), &(from))

struct counters {
	u64 rejected;  /* events that the filters left out */
	u64 tried;     /* the others; the next one's sequence number */
	u64 submitted; /* of them, those that user space will see */
	u64 lost;      /* of them, those for which the buffer had no room */
};

static __always_inline struct counters *counters_of(u32 program)
{
	return bpf_map_lookup_elem(MAP(COUNTERS), &program);
}

static __always_inline void *scratch_of(u32 program)
{
	return bpf_map_lookup_elem(MAP(SCRATCH), &program);
}

/* Number the event before there is room for it: one that is lost leaves a gap that shows. */
#define stamp(event, counters)                                   \
	do {                                                     \
		(event)->sequence = (counters)->tried++;         \
		(event)->cpu = bpf_get_smp_processor_id();       \
		(event)->monotonic = bpf_ktime_get_ns();         \
	} while (0)

#ifdef PERF_BUFFER
#define output(ctx, event, size) bpf_perf_event_output(ctx, MAP(OUTPUT), BPF_F_CURRENT_CPU, event, size)
#else
#define output(ctx, event, size) bpf_ringbuf_output(MAP(OUTPUT), event, size, 0)
#endif

static __always_inline void submit(void *ctx, struct counters *counters, void *event, u64 size)
{
	if (output(ctx, event, size))
		counters->lost++;
	else
		counters->submitted++;
}

#endif
