/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls getppid(2) on CPU 1, or executes a program, as often as it is told: a line of standard input says how, and
 * when that is done one on standard output says how many calls that were, and in how many nanoseconds.
 *
 *   flood SECONDS           without a pause
 *   paced SECONDS RATE      so many a second, evenly
 *   burst SECONDS SIZE GAP  so many without a pause, then GAP microseconds of none; only the former are timed
 *   exec SECONDS PROGRAM    executes it in a child, and waits for that
 */
#define _GNU_SOURCE
#include <sched.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef long long ns;

static ns now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void sleep_until(ns when)
{
	struct timespec time = { when / 1000000000, when % 1000000000 };
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}

static void call(long times)
{
	while (times--)
		syscall(SYS_getppid);
}

int main(void)
{
	cpu_set_t cpus;
	char line[256], how[16], rest[128];
	double seconds;
	CPU_ZERO(&cpus);
	CPU_SET(1, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus)) {
		perror("CPU 1");
		return 1;
	}
	prctl(PR_SET_TIMERSLACK, 1);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		rest[0] = 0;
		if (sscanf(line, "%15s %lf %127[^\n]", how, &seconds, rest) < 2)
			return 1;
		ns start = now(), end = start + seconds * 1e9, timed = 0;
		long calls = 0;
		if (!strcmp(how, "flood")) {
			for (; now() < end; calls += 1000)
				call(1000);
		} else if (!strcmp(how, "paced")) {
			ns period = 1e9 / atof(rest);
			for (ns next = start; next < end; next += period, calls++) {
				if (period >= 50000)
					sleep_until(next);
				else
					while (now() < next)
						;
				call(1);
			}
		} else if (!strcmp(how, "burst")) {
			long size = 1000, gap = 10000;
			sscanf(rest, "%ld %ld", &size, &gap);
			while (now() < end) {
				ns begin = now();
				call(size);
				timed += now() - begin;
				calls += size;
				sleep_until(now() + gap * 1000);
			}
		} else if (!strcmp(how, "exec")) {
			char *arguments[] = { rest, "one", "two", "three", NULL };
			for (; now() < end; calls++) {
				pid_t child;
				if (posix_spawn(&child, rest, NULL, NULL, arguments, (char *[]){ NULL }))
					return 1;
				waitpid(child, NULL, 0);
			}
		}
		printf("%ld %lld\n", calls, timed ? timed : now() - start);
		fflush(stdout);
	}
	return 0;
}
