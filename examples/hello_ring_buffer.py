"""hello-ring-buffer: the same events through a ring buffer, with an event class of our own.

The form that chapter 4 of "Learning eBPF" gives to hello-buffer.  Run as root; Ctrl-C ends it.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

import anyio

from ebpfstream import BPF, U32, Char, Comm, Event

PROGRAM = r"""
BPF_RINGBUF_OUTPUT(output, 8);

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

    output.ringbuf_output(&data, sizeof(data), 0);

    return 0;
}
"""


@dataclass
class Hello(Event):
    pid: U32
    uid: U32
    comm: Comm
    message: Annotated[str, Char(12)]


async def main() -> None:
    async with BPF(text=PROGRAM) as bpf:
        events = bpf.events("output", Hello)  # checked against the program's struct
        bpf.attach_syscall("execve", fn_name="hello")
        async for event in events:
            print(event.pid, event.uid, event.comm, event.message, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        anyio.run(main)
