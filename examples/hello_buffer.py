"""hello-buffer: who executes a program, through a perf buffer.

Chapter 2 of "Learning eBPF".  Run as root; Ctrl-C ends it.
"""

from contextlib import suppress

import anyio

from ebpfstream import BPF

PROGRAM = r"""
BPF_PERF_OUTPUT(output);

struct data_t {
    int pid;
    int uid;
    char command[16];
    char message[12];
};

int hello(void *ctx) {
    struct data_t data = {};
    char message[12] = "Hello World";

    data.pid = bpf_get_current_pid_tgid() >> 32;
    data.uid = bpf_get_current_uid_gid() & 0xFFFFFFFF;

    bpf_get_current_comm(&data.command, sizeof(data.command));
    bpf_probe_read_kernel(&data.message, sizeof(data.message), message);

    output.perf_submit(ctx, &data, sizeof(data));

    return 0;
}
"""


async def main() -> None:
    async with BPF(text=PROGRAM) as bpf:
        events = bpf.events("output")  # their type comes from the program
        bpf.attach_syscall("execve", fn_name="hello")
        async for event in events:
            print(event.pid, event.uid, event.command, event.message, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        anyio.run(main)
