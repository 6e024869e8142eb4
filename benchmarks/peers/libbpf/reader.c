/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counts the events of hello.bpf.c, or writes each as a JSON line; libbpf's defaults throughout.
 *
 * reader ring|perf PID BYTES count|latency|FILE
 */
#include <bpf/libbpf.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "event.h"
#include "hello.skel.h"

#define MOST_LATENCIES (1 << 20)

static volatile unsigned long long consumed, lost;
static FILE *file;
static long long *latencies;

static long long now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void take(const struct event *event)
{
	if (file)
		fprintf(file,
			"{\"monotonic\":%llu,\"pid\":%u,\"tid\":%u,\"uid\":%u,\"gid\":%u,\"comm\":\"%s\","
			"\"message\":\"%s\"}\n",
			event->monotonic, event->pid, event->tid, event->uid, event->gid, event->comm, event->message);
	else if (latencies && consumed < MOST_LATENCIES)
		latencies[consumed] = now() - event->monotonic;
	consumed++;
}

static int from_ring(void *context, void *data, size_t size)
{
	take(data);
	return 0;
}

static void from_perf(void *context, int cpu, void *data, unsigned int size)
{
	take(data);
}

static void not_from_perf(void *context, int cpu, unsigned long long count)
{
	lost += count;
}

/* As reporting.py does it. */
static void *report(void *nothing)
{
	char line[64];
	while (fgets(line, sizeof(line), stdin)) {
		printf("{\"time\":%lld,\"consumed\":%llu,\"lost\":%llu}\n", now(), consumed, lost);
		fflush(stdout);
	}
	if (file)
		fflush(file);
	printf("{\"latencies\":[");
	for (unsigned long long i = 0; latencies && i < consumed && i < MOST_LATENCIES; i++)
		printf("%s%lld", i ? "," : "", latencies[i]);
	printf("]}\n");
	fflush(stdout);
	_exit(0);
}

int main(int count, char **arguments)
{
	struct hello_bpf *hello = hello_bpf__open();
	struct ring_buffer *ring = NULL;
	struct perf_buffer *perf = NULL;
	pthread_t thread;
	if (count != 5 || !hello)
		return 1;
	int by_perf = !strcmp(arguments[1], "perf");
	size_t bytes = strtoul(arguments[3], NULL, 10);
	hello->rodata->target = atoi(arguments[2]);
	bpf_program__set_autoload(by_perf ? hello->progs.to_ring : hello->progs.to_perf, false);
	if (!by_perf)
		bpf_map__set_max_entries(hello->maps.ring, bytes);
	if (!strcmp(arguments[4], "latency"))
		latencies = calloc(MOST_LATENCIES, sizeof(*latencies));
	else if (strcmp(arguments[4], "count") && !(file = fopen(arguments[4], "w")))
		return 1;
	if (hello_bpf__load(hello))
		return 1;
	if (by_perf)
		perf = perf_buffer__new(bpf_map__fd(hello->maps.perf),
					bytes / libbpf_num_possible_cpus() / sysconf(_SC_PAGESIZE), from_perf,
					not_from_perf, NULL, NULL);
	else
		ring = ring_buffer__new(bpf_map__fd(hello->maps.ring), from_ring, NULL, NULL);
	if ((!ring && !perf) || hello_bpf__attach(hello))
		return 1;
	puts("ready");
	fflush(stdout);
	pthread_create(&thread, NULL, report, NULL);
	while ((by_perf ? perf_buffer__poll(perf, -1) : ring_buffer__poll(ring, -1)) >= 0)
		;
	return 1;
}
