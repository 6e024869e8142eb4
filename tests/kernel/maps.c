/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A map of every type, and programs that use them at each getppid(2) of the processes in `targets`. */

#if defined(__x86_64__)
#define GETPPID 110
#elif defined(__aarch64__)
#define GETPPID 173
#endif

struct key_t { u32 number; u64 wide; char name[8]; };
struct value_t { u64 count; char comm[16]; };
struct prefix_t { u32 prefixlen; u8 data[4]; };

BPF_HASH(targets, u32, u8);
BPF_HASH(hash, u32, u64);
BPF_HASH(structs, struct key_t, struct value_t, 100);
BPF_TABLE("lru_hash", u32, u64, lru, 1024);
BPF_PERCPU_HASH(percpu_hash, u32, u64);
BPF_TABLE("lru_percpu_hash", u32, u64, lru_percpu, 1024);
BPF_ARRAY(array, u64, 7);
BPF_PERCPU_ARRAY(percpu_array, u32, 7);
BPF_PERCPU_ARRAY(percpu_structs, struct value_t, 2);
BPF_HISTOGRAM(histogram);
BPF_QUEUE(queue, u64, 1024);
BPF_STACK(stack, struct value_t, 1024);
BPF_LPM_TRIE(trie, struct prefix_t, u64, 64);
BPF_PROG_ARRAY(programs, 300);
BPF_STACK_TRACE(stacks, 128);
BPF_F_TABLE("hash", u32, u64, read_only, 4, 8);
BPF_F_TABLE("hash", u32, u64, write_only, 4, 16);
BPF_CGROUP_ARRAY(cgroups, 4);
BPF_PERF_OUTPUT(output);
BPF_DEVMAP(devices, 4);
BPF_PERCPU_ARRAY(sequence, u64, 1);
BPF_HASH(unique, u64, u64, 100000);
BPF_QUEUE(busy_queue, u64, 100000);
BPF_PERCPU_ARRAY(failed, u64, 1);
BPF_HASH(big, u32, u64, 150000);

static inline int wanted(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	return ctx->args[1] == GETPPID && targets.lookup(&pid);
}

int each(struct bpf_raw_tracepoint_args *ctx)
{
	if (!wanted(ctx))
		return 0;
	u32 key = 17;
	int index = 5;
	u64 zero = 0, *found, n, trace;
	hash.increment(key);
	found = percpu_hash.lookup_or_try_init(&key, &zero);  /* in such maps BCC's increment() makes no element */
	if (found)
		*found += 1;
	found = lru.lookup_or_try_init(&key, &zero);
	if (found)
		*found += 1;
	found = lru_percpu.lookup_or_try_init(&key, &zero);
	if (found)
		*found += 1;
	percpu_array.increment(index);
	histogram.increment(bpf_log2l(1000));
	found = array.lookup(&index);
	if (!found)
		return 0;
	n = *found;
	*found += 1;
	queue.push(&n, 0);
	struct value_t value = {.count = n};
	bpf_get_current_comm(&value.comm, sizeof(value.comm));
	stack.push(&value, 0);
	struct key_t wide = {.number = 7, .wide = 1ULL << 40, .name = "getppid"};
	structs.update(&wide, &value);
	struct prefix_t address = {.prefixlen = 32, .data = {10, 1, n, n}};
	found = trie.lookup(&address);
	if (found)
		lock_xadd(found, 1);
	trace = stacks.get_stackid(ctx, 0);
	index = 6;
	array.update(&index, &trace);
	programs.call(ctx, 5);
	index = 4;
	array.increment(index);
	return 0;
}

int called(struct bpf_raw_tracepoint_args *ctx)
{
	int index = 3;
	array.increment(index);
	return 0;
}

static inline u64 next(void)
{
	int zero = 0;
	u64 *number = sequence.lookup(&zero);
	if (!number)
		return 0;
	*number += 1;
	return *number << 8 | bpf_get_smp_processor_id();
}

int once_each(struct bpf_raw_tracepoint_args *ctx)
{
	if (!wanted(ctx))
		return 0;
	int zero = 0;
	u64 number = next();
	if (unique.update(&number, &number))
		failed.increment(zero);
	return 0;
}

int pushing(struct bpf_raw_tracepoint_args *ctx)
{
	if (!wanted(ctx))
		return 0;
	int zero = 0;
	u64 number = next();
	if (busy_queue.push(&number, 0))
		failed.increment(zero);
	return 0;
}

int counting(struct bpf_raw_tracepoint_args *ctx)
{
	if (!wanted(ctx))
		return 0;
	u32 key = bpf_get_prandom_u32() & 255;
	u64 zero = 0, *found;
	found = hash.lookup_or_try_init(&key, &zero);
	if (found)
		lock_xadd(found, 1);
	found = percpu_hash.lookup_or_try_init(&key, &zero);
	if (found)
		*found += 1;
	return 0;
}

int churning(struct bpf_raw_tracepoint_args *ctx)
{
	if (!wanted(ctx))
		return 0;
	u32 random = bpf_get_prandom_u32();
	u32 stays = random % 100000, comes = 100000 + (random >> 8) % 50000;
	u64 value = 1;
	big.update(&stays, &value);
	if (random >> 31)
		big.update(&comes, &value);
	else
		big.delete(&comes);
	return 0;
}
