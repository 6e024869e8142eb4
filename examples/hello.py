"""hello: a line for every execve(2), printed in the kernel and read from trace_pipe.

Chapter 2 of "Learning eBPF", its first program.  Run as root; Ctrl-C ends it.
"""

from contextlib import suppress

import anyio

from ebpfstream import BPF

PROGRAM = r"""
int hello(void *ctx) {
    bpf_trace_printk("Hello World!");
    return 0;
}
"""


async def main() -> None:
    async with BPF(text=PROGRAM) as bpf:
        lines = bpf.trace()
        async with lines:
            bpf.attach_syscall("execve", fn_name="hello")
            async for line in lines:
                print(line, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        anyio.run(main)
