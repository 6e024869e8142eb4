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

/* include/uapi/asm-generic/errno-base.h, errno.h; what the tree of types does not have */
#ifndef EAGAIN
#define ENOENT 2
#define E2BIG 7
#define EAGAIN 11
#define ENOSPC 28
#endif

#define SCRATCH_SIZE 32768 /* the largest value of a per-CPU array: PCPU_MIN_UNIT_SIZE, mm/percpu.c */

#define read_kernel(to, from) bpf_probe_read_kernel(&(to), sizeof(to), &(from))

struct counters {
	u64 rejected;	    /* events that the filters left out */
	u64 tried;	    /* the others */
	u64 skipped;	    /* of them, those that a pause or sampling left out */
	u64 submitted;	    /* those that user space will see */
	u64 lost_full;	    /* those for which there was no room */
	u64 lost_too_large; /* those for which there never is */
	u64 lost_no_buffer; /* those on a CPU that has no buffer */
	u64 lost_otherwise; /* the rest; the last one's error is in `error` */
	u64 sequence;	    /* the next event's number */
	u32 error;
	u32 since;    /* events skipped since the last one that was not */
	u32 sampling; /* whether the buffer was too full, and has not been empty enough since */
};

/* Written by user space; `fill` for a perf buffer alone, whose fill no program can see.  As in readymade.py. */
struct control {
	u32 paused;
	u32 one_in; /* of how many events one is kept while the buffer is too full; 1: all */
	u64 high, low, fill;
};

static __always_inline struct counters *counters_of(u32 program)
{
	return bpf_map_lookup_elem(MAP(COUNTERS), &program);
}

static __always_inline void *scratch_of(u32 program)
{
	return bpf_map_lookup_elem(MAP(SCRATCH), &program);
}

#ifdef PERF_BUFFER
#define output(ctx, event, size) bpf_perf_event_output(ctx, MAP(OUTPUT), BPF_F_CURRENT_CPU, event, size)
#define fill_of(control) (control)->fill
#else
/* Whether an event wakes the reader: 0 leaves that to the kernel, which wakes one that had caught up. */
#ifndef WAKEUP
#define WAKEUP 0
#endif
#define output(ctx, event, size) bpf_ringbuf_output(MAP(OUTPUT), event, size, WAKEUP)
#define fill_of(control) bpf_ringbuf_query(MAP(OUTPUT), BPF_RB_AVAIL_DATA)
#endif

/* Count the event as tried; false if it is to be skipped: the stream is paused, or samples and this is not its turn. */
static __always_inline bool admitted(struct counters *counters)
{
	u32 key = 0;
	struct control *control = bpf_map_lookup_elem(MAP(CONTROL), &key);
	counters->tried++;
	if (!control)
		return true;
	bool skip = control->paused;
	if (control->one_in > 1 && !skip) {
		u64 fill = fill_of(control);
		if (fill >= control->high)
			counters->sampling = 1;
		else if (fill <= control->low)
			counters->sampling = 0;
		skip = counters->sampling && counters->since + 1 < control->one_in;
	}
	if (!skip)
		return true;
	counters->since++;
	counters->skipped++;
	return false;
}

/*
 * Number an admitted event before there is room for it: one that is lost leaves a gap that shows.  It stands for
 * itself and for those that were skipped before it.
 */
#define stamp(event, counters)                                   \
	do {                                                     \
		(event)->sequence = (counters)->sequence++;      \
		(event)->weight = 1 + (counters)->since;         \
		(counters)->since = 0;                           \
		(event)->cpu = bpf_get_smp_processor_id();       \
		(event)->monotonic = bpf_ktime_get_ns();         \
	} while (0)

static __always_inline void submit(void *ctx, struct counters *counters, void *event, u64 size)
{
	long error = output(ctx, event, size);
	if (!error) {
		counters->submitted++;
		return;
	}
#ifndef PERF_BUFFER
	/* All that a ring buffer says is EAGAIN (____bpf_ringbuf_output(), kernel/bpf/ringbuf.c). */
	if (size + 16 > bpf_ringbuf_query(MAP(OUTPUT), BPF_RB_RING_SIZE))
		error = -E2BIG;
#endif
	if (error == -EAGAIN || error == -ENOSPC)
		counters->lost_full++;
	else if (error == -E2BIG)
		counters->lost_too_large++;
	else if (error == -ENOENT)
		counters->lost_no_buffer++;
	else {
		counters->lost_otherwise++;
		counters->error = -error;
	}
}

#endif
