"""hello-map: how many programs each user has executed, every two seconds, from a hash map.

Chapter 2 of "Learning eBPF".  Run as root; Ctrl-C ends it.
"""

from contextlib import suppress

import anyio

from ebpfstream import BPF

PROGRAM = r"""
BPF_HASH(counter_table);

int hello(void *ctx) {
    u64 uid;
    u64 counter = 0;
    u64 *p;

    uid = bpf_get_current_uid_gid() & 0xFFFFFFFF;
    p = counter_table.lookup(&uid);
    if (p != 0) {
        counter = *p;
    }
    counter++;
    counter_table.update(&uid, &counter);
    return 0;
}
"""


async def main() -> None:
    async with BPF(text=PROGRAM) as bpf:
        bpf.attach_syscall("execve", fn_name="hello")
        async for counts in bpf.snapshots("counter_table", every=2.0):
            print("\t".join(f"ID {uid}: {count}" for uid, count in counts.items()), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        anyio.run(main)
