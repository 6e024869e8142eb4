/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who executes something:
 *     ebpfstream program examples/hello.c --attach syscall:execve=hello
 */
BPF_PERF_OUTPUT(output);

struct data_t {
	u32 pid;
	u32 uid;
	char command[16];
	char message[12];
};

int hello(void *ctx)
{
	struct data_t data = { .message = "Hello World" };
	data.pid = bpf_get_current_pid_tgid() >> 32;
	data.uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(&data.command, sizeof(data.command));
	output.perf_submit(ctx, &data, sizeof(data));
	return 0;
}
