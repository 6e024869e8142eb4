"""hello-tail: system calls, each handed to a function of its own by a tail call.

Chapter 2 of "Learning eBPF"; the numbers are those of x86-64.  Run as root; Ctrl-C ends it.
"""

from contextlib import suppress

import anyio

from ebpfstream import BPF

PROGRAM = r"""
BPF_PROG_ARRAY(syscall, 300);

int hello(struct bpf_raw_tracepoint_args *ctx) {
    int opcode = ctx->args[1];
    syscall.call(ctx, opcode);
    bpf_trace_printk("Another syscall: %d", opcode);
    return 0;
}

int hello_execve(void *ctx) {
    bpf_trace_printk("Executing a program");
    return 0;
}

int hello_timer(struct bpf_raw_tracepoint_args *ctx) {
    int opcode = ctx->args[1];
    switch (opcode) {
        case 222:
            bpf_trace_printk("Creating a timer");
            break;
        case 226:
            bpf_trace_printk("Deleting a timer");
            break;
        default:
            bpf_trace_printk("Some other timer operation");
            break;
    }
    return 0;
}

int ignore_opcode(void *ctx) {
    return 0;
}
"""

EXECVE = 59
TIMERS = range(222, 227)
# What every machine does all the time, and what this program does to print a line.
IGNORED = [0, 1, 7, 8, 13, 14, 16, 20, 35, 39, 202, 230, 232, 233, 262, 270, 271, 281]


async def main() -> None:
    async with BPF(text=PROGRAM) as bpf:
        bpf.tail_calls(
            "syscall",
            {
                EXECVE: "hello_execve",
                **dict.fromkeys(TIMERS, "hello_timer"),
                **dict.fromkeys(IGNORED, "ignore_opcode"),
            },
        )
        lines = bpf.trace()
        async with lines:
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="hello")
            async for line in lines:
                print(line, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        anyio.run(main)
