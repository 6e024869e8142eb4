"""Header trees from BTF: the layouts that BCC's code generation makes of them, names, and the cache."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ebpfstream.errors import UnsupportedError
from ebpfstream.kernel import btf, headers, shim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
VMLINUX = Path("/sys/kernel/btf/vmlinux")
NOWHERE = Path("/nonexistent")

needs_kernel = pytest.mark.kernel


@pytest.fixture
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("EBPFSTREAM_CACHE", str(root))
    return root


@pytest.fixture(scope="session")
def kept_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def kept(kept_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for the whole session, for tests that only compile."""
    monkeypatch.setenv("EBPFSTREAM_CACHE", str(kept_root))


# ---------------------------------------------------------------------------------------------- BCC

COMPILE = """
import ctypes, json, os, sys
sys.path.append("/usr/lib/python3/dist-packages")
sys.dont_write_bytecode = True
request = json.load(sys.stdin)
os.environ["BCC_KERNEL_SOURCE"] = request["tree"]
from bcc import BPF, lib
try:
    bpf = BPF(text=request["text"].encode())
except Exception as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
code = {}
for name in request["functions"]:
    start = lib.bpf_function_start(bpf.module, name.encode())
    code[name] = ctypes.string_at(start, lib.bpf_function_size(bpf.module, name.encode())).hex()
print(json.dumps({"code": code}))
"""


def build(tree: Path | None, text: str, *functions: str, cwd: Path | None = None) -> dict[str, bytes]:
    """Compile with BCC in a process of its own; the instructions of each function."""
    assert tree is not None
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", COMPILE],
        input=json.dumps({"tree": str(tree), "text": text, "functions": functions}),
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "error" not in answer, done.stderr + answer["error"]
    assert "Unable to find kernel headers" not in done.stdout
    return {name: bytes.fromhex(code) for name, code in answer["code"].items()}


def passed_to_calls(code: bytes) -> list[int | None]:
    """How far from the function's argument the first argument of each call lies."""
    registers: dict[object, int | None] = {1: 0}
    passed = []
    for opcode, operands, offset, immediate in struct.iter_unpack("<BBhi", code):
        target, source = operands & 15, operands >> 4
        if opcode == 0xBF:  # target = source
            registers[target] = registers[source]
        elif opcode == 0x07:  # target += immediate
            before = registers[target]
            assert before is not None
            registers[target] = before + immediate
        elif opcode == 0x7B:  # a spill
            assert target == 10
            registers["stack", offset] = registers[source]
        elif opcode == 0x79:
            assert source == 10
            registers[target] = registers["stack", offset]
        elif opcode == 0xB7:  # the return value
            registers[target] = None
        elif opcode == 0x85:
            passed.append(registers[1])
            registers |= dict.fromkeys(range(6))
        else:
            assert opcode == 0x95, f"instruction {opcode:#x} is not one that these functions need"
    return passed


# ---------------------------------------------------------------------------------------------- BTF


class Layout(NamedTuple):
    tag: str
    size: int
    members: list[tuple[str, int]]  # bit-fields left out, those of unnamed members included


@cache
def layouts() -> dict[str, Layout]:
    """Every struct and union with a name of its own, read from BTF by nothing under test."""
    data = VMLINUX.read_bytes()
    _, _, _, header, at, length, strings, _ = struct.unpack_from("<HBBIIIII", data)
    at += header
    end, strings = at + length, strings + header
    each = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
    extra = {1: 4, 3: 12, 14: 4, 17: 4}

    def text(offset: int) -> str:
        return data[strings + offset : data.index(b"\0", strings + offset)].decode()

    types: list[tuple[int, str, int, list[tuple[str, int, int, int]]]] = [(0, "", 0, [])]
    while at < end:
        name, info, size = struct.unpack_from("<III", data, at)
        kind, count, has_bits = info >> 24 & 31, info & 0xFFFF, info >> 31
        members = []
        if kind in (4, 5):
            for row in range(count):
                member, of, bit = struct.unpack_from("<III", data, at + 12 + 12 * row)
                position, width = (bit & 0xFFFFFF, bit >> 24) if has_bits else (bit, 0)
                members.append((text(member), of, position, width))
        types.append((kind, text(name), size, members))
        at += 12 + extra.get(kind, 0) + each.get(kind, 0) * count
    taken = Counter(name for kind, name, _, _ in types if kind in (4, 5, 6, 19))

    def flat(members: list[tuple[str, int, int, int]], base: int) -> Iterator[tuple[str, int]]:
        for name, of, position, width in members:
            if name and not width and (base + position) % 8 == 0:
                yield name, (base + position) // 8
            elif not name:
                while types[of][0] in (9, 10, 11, 18):
                    of = types[of][2]
                yield from flat(types[of][3], base + position)

    return {
        name: Layout(f"{('struct', 'union')[kind - 4]} {name}", size, list(flat(members, 0)))
        for kind, name, size, members in types
        if kind in (4, 5) and name and taken[name] == 1
    }


def program_of(wanted: list[Layout]) -> str:
    functions = ["static long (*note)(void *) = (void *)6;"]
    for number, layout in enumerate(wanted):
        notes = "".join(f"note(&p->{name}); " for name, _ in layout.members)
        functions.append(f"int f{number}({layout.tag} *p) {{ {notes}note(p + 1); return 0; }}")
    return "\n".join(functions)


def wrong(tree: Path | None, text: str, wanted: list[Layout]) -> tuple[int, dict[str, list[str]]]:
    """How many offsets and sizes were looked at, and those of each type that differ from BTF."""
    code = build(tree, text, *(f"f{number}" for number in range(len(wanted))))
    count, found = 0, dict[str, list[str]]()
    for number, layout in enumerate(wanted):
        expected = [*layout.members, ("(size)", layout.size)]
        got = passed_to_calls(code[f"f{number}"])
        assert len(got) == len(expected)
        count += len(expected)
        for (member, offset), seen in zip(expected, got, strict=True):
            if seen != offset:
                found.setdefault(layout.tag, []).append(f"{member}: {seen}, should be {offset}")
    return count, found


IMPORTANT = """
task_struct cred mm_struct vm_area_struct cgroup sock sock_common inet_sock tcp_sock file dentry inode qstr
path super_block fs_struct files_struct mount vfsmount nsproxy pid_namespace pid upid uts_namespace net
signal_struct sighand_struct linux_binprm css_set cgroup_subsys_state kernfs_node socket sk_buff net_device
request bio gendisk block_device thread_info user_namespace user_struct pt_regs bpf_raw_tracepoint_args
""".split()  # noqa: SIM905


def important() -> list[Layout]:
    # Left out: what this kernel is built without, and names that two types share.
    return [layouts()[name] for name in IMPORTANT if name in layouts()]


@needs_kernel
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("which", ["reduced", "whole"])
def test_offsets_of_generated_code(which: str) -> None:
    wanted = important()
    assert {layout.tag.split()[1] for layout in wanted} >= {
        "task_struct", "cred", "mm_struct", "cgroup", "sock", "sock_common", "file", "dentry", "inode",
        "fs_struct", "mount", "vfsmount", "nsproxy", "pid_namespace", "signal_struct", "linux_binprm",
        "css_set", "kernfs_node",
    }  # fmt: skip
    text = program_of(wanted)
    tree = next(path for path in headers.trees(text) if path and path.name.startswith(which))
    count, differing = wrong(tree, text, wanted)
    assert differing == {}
    assert count > 1500


@needs_kernel
def test_members_of_unnamed_members_are_checked() -> None:
    # inode's first union and sock_common's are where hand-written copies go wrong.
    assert {"i_nlink", "__i_nlink"} & {name for name, _ in layouts()["inode"].members}
    assert {"skc_daddr", "skc_rcv_saddr"} <= {name for name, _ in layouts()["sock_common"].members}


@needs_kernel
@pytest.mark.usefixtures("kept")
@pytest.mark.timeout(300)
def test_offsets_of_every_type() -> None:
    wanted = list(layouts().values())
    tree = list(headers.trees(""))[1]
    # BCC's time grows with the square of how many functions it is given.
    parts = [wanted[at : at + 400] for at in range(0, len(wanted), 400)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = list(pool.map(lambda part: wrong(tree, program_of(part), part), parts))
    assert [differing for _, differing in answers if differing] == []
    assert sum(count for count, _ in answers) > 30_000


@needs_kernel
def test_padding_as_libbpf_writes_it_gives_wrong_offsets(
    cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were this to fail, BCC's LLVM no longer needs the padding rewritten."""
    monkeypatch.setattr(btf, "plain_padding", lambda text: text)
    wanted = important()
    text = program_of(wanted)
    _, differing = wrong(next(headers.trees(text)), text, wanted)
    assert differing


# ----------------------------------------------------------------------------------------- programs

HELLO = """
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

PARENT = """
BPF_HASH(parents, u32, u32);
int hello(void *ctx) {
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    u32 pid = task->tgid, parent = task->real_parent->tgid;
    parents.update(&pid, &parent);
    return task->mm->exe_file->f_path.dentry->d_name.len;
}
"""

INCLUDES = """
#include <uapi/linux/ptrace.h>
#include <linux/sched.h>
#include <net/sock.h>
#include <bcc/proto.h>
#include <linux/no/such/header.h>
#include <stdint.h>
struct event_t { u32 saddr; u16 port; uint8_t state; char comm[TASK_COMM_LEN]; } __packed;
BPF_RINGBUF_OUTPUT(events, 8);
BPF_STACK_TRACE(stacks, 1024);
int hello(struct pt_regs *ctx, struct sock *sk) {
    struct event_t event = {.saddr = sk->__sk_common.skc_rcv_saddr, .port = ntohs(sk->__sk_common.skc_dport)};
    event.state = sk->__sk_common.skc_state == TCP_ESTABLISHED;
    bpf_get_current_comm(event.comm, sizeof(event.comm));
    stacks.get_stackid(ctx, BPF_F_USER_STACK);
    events.ringbuf_output(&event, sizeof(event), 0);
    return PT_REGS_RC(ctx);
}
int syscall__execve(struct pt_regs *ctx, const char __user *filename) {
#ifndef CONFIG_ARCH_HAS_SYSCALL_WRAPPER
#error "arguments of system calls are in a second pt_regs"
#endif
#if LINUX_VERSION_CODE < KERNEL_VERSION(4, 9, 0) || !IS_ENABLED(CONFIG_BPF_SYSCALL) || IS_ENABLED(CONFIG_NONE)
#error "not this kernel"
#endif
    return min(PAGE_SIZE, 1UL);
}
"""

OWN_NAMES = """
struct key { u32 pid; char name[16]; };   // struct cgroup { not this one };
/* struct file { nor this one } */
struct __attribute__((packed, aligned(8))) s { u64 a; };
union page { int x; struct inode { int y; } inode; };
enum { READ, WRITE };
enum fail { fail = 3, remote, };
typedef unsigned int u32;
typedef unsigned long long __u64;
typedef struct { long nested[3]; } kuid_t, *atomic_t;
typedef int (*filldir_t)(void);
BPF_HASH(start, struct key, kuid_t);
BPF_TABLE("hash", u32, struct s, initial, 10);
static const int regular = 7;
static inline int max(int a, int b) { return a > b ? a : b; }
static int all(struct key *key) { return key->pid; }
int hello(void *ctx) {
    const char text[] = "struct task_struct { not this one }";
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct key key = {.pid = task->pid};
    kuid_t value = {{READ, WRITE, remote}};
    _Static_assert(sizeof(struct key) == 20 && sizeof(kuid_t) == 24 && READ == 0 && WRITE == 1, "own");
    _Static_assert(remote == 4 && sizeof(struct s) == 8 && sizeof(union page) == 4, "own");
    start.update(&key, &value);
    u32 rights = task->cred->session_keyring->perm;   // session_keyring is a struct key of the kernel's
    return max(all(&key), regular) + rights + task->mm->exe_file->f_flags + sizeof(text);
}
"""

# What kernel headers call otherwise, or compute.
MACROS = """
enum { LENGTH = DNAME_INLINE_LEN };
#undef DNAME_INLINE_LEN
#define DNAME_INLINE_LEN LENGTH
struct event_t { char name[DNAME_INLINE_LEN]; char interface[IFNAMSIZ]; u32 strlen; };
BPF_HASH(births, struct dentry *, struct event_t);
int hello(struct pt_regs *ctx, struct sock *sk, struct file *file, struct request_sock *request) {
    struct event_t event = {};
    u64 slot = div_u64(bpf_ktime_get_ns(), 100 * NSEC_PER_MSEC);
    struct inet_sock *inet = inet_sk(sk);
    _Static_assert(sizeof(((struct dentry *)0)->d_iname) == DNAME_INLINE_LEN, "the kernel's");
    _Static_assert(ENOMEM == 12 && ETIMEDOUT == 110 && SIGKILL == 9 && REQ_OP_MASK == 255, "numbers");
    if (sk->sk_family == AF_INET6)
        event.strlen = sk->sk_v6_daddr.s6_addr32[0] + sk -> sk_prot -> memory_pressure[0];
    event.strlen += sk->sk_state + inet->inet_dport + inet->inet_daddr + inet_rsk(request)->ir_num;
    memcpy(event.interface, "lo", strlen("lo") + 1);
    if (file->f_mode & FMODE_CREATED && PT_REGS_IP(ctx) > PAGE_OFFSET)
        births.update(&file->f_path.dentry, &event);
    return slot;
}
""".replace("inet_rsk(request)", "((struct inet_request_sock *)request)")

# Members of its own that have such names; and what else it calls so.
OWN_MEMBERS = """
struct event_t { u16 sk_family, sk_num; u32 *inet_daddr; u8 s6_addr[16]; };
static int strlen(const char *text) { return text[0]; }
int hello(struct event_t *event) {
    u16 sk_num = event->sk_num + event->sk_family;
    int ENOMEM_ = -ENOMEM;
    return sk_num + event->s6_addr[0] + *event->inet_daddr + strlen("") + ENOMEM_;
}
"""


@needs_kernel
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("which", ["reduced", "whole"])
@pytest.mark.parametrize(
    "text",
    [HELLO, PARENT, INCLUDES, OWN_NAMES, MACROS, OWN_MEMBERS],
    ids=["hello", "parent", "includes", "own names", "macros", "own members"],
)
def test_programs_compile(which: str, text: str) -> None:
    tree = next(path for path in headers.trees(text) if path and path.name.startswith(which))
    assert build(tree, text, "hello")["hello"]


@needs_kernel
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("which", ["reduced", "whole"])
def test_a_function_that_only_headers_define_is_refused(which: str) -> None:
    """Compiled, it would be a call to nowhere that the verifier does not know what to make of."""
    text = "int hello(void *ctx) { return sg_is_last(ctx); }\n"
    tree = next(path for path in headers.trees(text) if path and path.name.startswith(which))
    with pytest.raises(AssertionError, match="implicit declaration of function 'sg_is_last'"):
        build(tree, text, "hello")


@needs_kernel
@pytest.mark.usefixtures("kept")
def test_types_that_an_included_file_uses_are_in_the_whole_tree(tmp_path: Path) -> None:
    (tmp_path / "mine.h").write_text(
        "#include <linux/fs.h>\nstatic long flags(struct file *file) { return file->f_inode->i_ino; }\n"
    )
    text = '#include "mine.h"\nint hello(void *ctx) { return flags(ctx); }\n'
    reduced, whole = headers.trees(text)
    with pytest.raises(AssertionError, match="incomplete definition of type 'struct file'"):
        build(reduced, text, "hello", cwd=tmp_path)
    assert build(whole, text, "hello", cwd=tmp_path)


@needs_kernel
@pytest.mark.usefixtures("kept")
def test_the_kernels_type_is_read_where_the_program_has_one_of_that_name() -> None:
    text = """
    struct key { u64 own[100]; };
    static long (*note)(void *) = (void *)6;
    int f0(struct cred *p) { note(&p->session_keyring->perm); note(p + 1); return 0; }
    """.replace(
        "&p->session_keyring->perm", "(void *)p + __builtin_offsetof(typeof(*p->session_keyring), perm)"
    )
    code = build(next(headers.trees(text)), text, "f0")["f0"]
    assert passed_to_calls(code) == [dict(layouts()["key"].members)["perm"], layouts()["cred"].size]


@needs_kernel
@pytest.mark.usefixtures("kept")
def test_a_vmlinux_h_of_the_users_does_not_get_in_between(tmp_path: Path) -> None:
    for name in ("vmlinux.h", "include/vmlinux.h", "include/linux/kconfig.h", "linux/kconfig.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#ifndef __VMLINUX_H__\n#error the wrong one\n#endif\n")
    assert build(next(headers.trees(PARENT)), PARENT, "hello", cwd=tmp_path)
    text = '#include "vmlinux.h"\n' + PARENT
    assert build(next(headers.trees(text)), text, "hello", cwd=tmp_path)
    assert build(next(headers.trees(text)), text, "hello", cwd=Path("/"))


@needs_kernel
@pytest.mark.usefixtures("cache_root")
def test_a_kernel_older_than_bcc(tmp_path: Path) -> None:
    """Its enums lack helpers and flags that BCC's headers name."""
    old = tmp_path / "vmlinux"
    missing = {"BPF_FUNC_" + name for name in shim.HELPERS.split()[100:]}
    missing |= {"BPF_F_CURRENT_CPU", "BPF_F_NO_PREALLOC", "BPF_F_STACK_BUILD_ID", "TASK_COMM_LEN"}
    missing |= {"BPF_F_USER_STACK", "BPF_ANY"}
    old.write_bytes(btf.Btf(VMLINUX.read_bytes()).renamed({"bpf_dynptr", "bpf_timer"}, missing))
    for tree in headers.trees(INCLUDES, headers.Kernel(btf=old)):
        assert tree
        assert "BPF_F_CURRENT_CPU =" not in (tree / "include/vmlinux.h").read_text()
        assert build(tree, INCLUDES, "hello")


# -------------------------------------------------------------------------------------- what is made


def test_helper_numbers_are_the_kernels() -> None:
    text = btf.dump(VMLINUX.read_bytes(), btf.Btf(VMLINUX.read_bytes()).reachable({"BPF_FUNC_unspec"}))
    known = {name: int(number) for name, number in re.findall(r"\tBPF_FUNC_(\w+) = (\d+),", text)}
    assert known.pop("unspec") == 0
    ours = {name: number for number, name in enumerate(shim.HELPERS.split(), 1)}
    assert ours == known | {name: number for name, number in ours.items() if number > len(known)}
    assert len(ours) == 211


def test_a_program_reaches_what_its_members_point_to() -> None:
    data = VMLINUX.read_bytes()
    index = btf.Btf(data)

    def defined(text: str) -> set[str]:
        found = btf.dump(data, index.reachable(shim.read_program(text).identifiers))
        return set(re.findall(r"(?m)^struct (\w+) \{$", found))

    assert "mm_struct" not in defined("int f(struct task_struct *t) { return t->pid; }")
    assert "mm_struct" in defined("int f(struct task_struct *t) { return t->mm; }")
    deep = defined("int f(struct task_struct *t) { return t->mm->exe_file->f_inode->i_sb->s_dev; }")
    assert {"mm_struct", "file", "inode", "super_block"} <= deep
    assert "bpf_iter__task" in defined("BPF_ITER(task) { return 0; }")
    assert "pt_regs" in defined("")


def test_padding_becomes_arrays() -> None:
    text = "{\n\tint x;\n\tlong: 64;\n\tlong: 64;\n\tstruct {\n\t\tlong: 64;\n\t};\n\tint: 32;\n};\n"
    assert btf.plain_padding(text) == (
        "{\n\tint x;\n\tlong __btf_pad1[2];\n\tstruct {\n\t\tlong __btf_pad2[1];\n\t};\n\tint: 32;\n};\n"
    )


def test_what_a_program_says_of_itself() -> None:
    program = shim.read_program(OWN_NAMES)
    assert program.tags == {"key", "s", "page", "inode", "fail"}
    assert program.ordinary == {
        "READ", "WRITE", "fail", "remote", "u32", "__u64", "kuid_t", "atomic_t", "filldir_t",
        "start", "initial", "regular", "max", "all", "hello",
    }  # fmt: skip
    assert program.includes == program.macros == frozenset()
    assert "not" not in program.identifiers
    program = shim.read_program(
        "#include <linux/sched.h> // <linux/a.h>\n"
        "/* #include <linux/b.h> */ \n # include <linux/c/d.h>\n#include <../e.h>\n"
        "#include <linux/../../f.h>\n#include <linux/>\n"
        '#include "linux/g.h"\n'
        "#include <bcc/proto.h>\n#include <stdarg.h>\n#include <stdint.h>\n#include </h/i.h>\n"
        "#define PATH_MAX \\\n 7\n#define MINE struct task_struct { }\n"
        "struct a { int x; } __packed;\nstruct b { int y; } __attribute__((packed)) name;\nstruct forward;\n"
    )
    assert program.includes == {"linux/c/d.h", "stdint.h"}  # linux/sched.h is there for everybody
    assert program.macros == {"PATH_MAX"}
    assert program.tags == {"a", "b"}
    assert program.ordinary == {"name"}
    assert shim.read_program(OWN_MEMBERS).members == frozenset()
    assert shim.read_program(MACROS).members == {
        "d_iname", "inet_daddr", "inet_dport", "ir_num", "s6_addr32",
        "sk_family", "sk_prot", "sk_state", "sk_v6_daddr",
    }  # fmt: skip


def test_a_member_that_the_kernel_has_under_that_name_is_no_macro() -> None:
    def macros(vmlinux: str) -> str:
        program = shim.read_program("int f(struct dentry *d) { return d->d_iname[DNAME_INLINE_LEN - 1]; }")
        return shim.files(vmlinux, program, release="6.1.0", page_size=4096)["linux/macros.h"]

    before = macros("struct dentry {\n\tunsigned char d_iname[32];\n};\n")
    assert "#define DNAME_INLINE_LEN 32\n" in before
    assert "#define d_iname" not in before
    since = macros(
        "union shortname_store {\n\tunsigned char string[40];\n\tlong unsigned int words[5];\n};\n"
        "struct dentry {\n\tunion shortname_store d_shortname;\n};\n"
    )
    assert "#define DNAME_INLINE_LEN 40\n" in since
    assert "#define d_iname d_shortname.string\n" in since


@pytest.mark.usefixtures("cache_root")
def test_stubs_are_empty_and_stay_inside() -> None:
    names = "linux/no/such.h", "net/neither.h", "bcc/proto.h", "linux/../../up.h"
    text = "".join(f"#include <{name}>\n" for name in names)
    tree = next(headers.trees(text))
    assert tree
    assert (tree / "include/linux/no/such.h").read_text() == ""
    assert (tree / "include/net/neither.h").read_text() == ""
    assert (tree / "include/linux/kconfig.h").read_text() == shim.KCONFIG
    assert not (tree / "include/bcc").exists()
    assert not list(tree.parent.rglob("up.h"))


@pytest.mark.usefixtures("cache_root")
def test_hz_is_the_kernels_or_unknown(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text('CONFIG_HZ=300\nCONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_D="d=e"\n')

    def options(*configs: Path) -> str:
        tree = next(headers.trees(str(configs), headers.Kernel(configs=configs)))
        assert tree
        return (tree / "include/linux/autoconf.h").read_text()

    assert options(NOWHERE, config).splitlines() == [
        "#define CONFIG_HZ 300",
        "#define HZ 300",
        "#define CONFIG_A 1",
        "#define CONFIG_B_MODULE 1",
        '#define CONFIG_D "d=e"',
    ]
    assert "HZ" not in options(NOWHERE)


@pytest.mark.parametrize(
    ("release", "code"),
    [
        ("6.18.44-fc-v769", 0x06122C),
        ("6.1.0-44-amd64", 0x060100),
        ("5.15", 0x050F00),
        ("6.18-rc3+", 0x061200),
        ("4.19.325", 0x0413FF),
    ],
)
def test_version_code(release: str, code: int) -> None:
    files = shim.files("", shim.read_program(""), release=release, page_size=65536)
    assert f"LINUX_VERSION_CODE {code}\n" in files["linux/version.h"]
    assert "PAGE_SHIFT 16\n" in files["asm/page.h"]


# ---------------------------------------------------------------------------------- where from, errors


def test_own_headers_come_last(cache_root: Path, tmp_path: Path) -> None:
    kernel = headers.Kernel(modules=tmp_path, release="1.2.3", kheaders=NOWHERE)
    assert [path and path.name.split("-")[0] for path in headers.trees("", kernel)] == ["reduced", "whole"]
    kconfig = tmp_path / "1.2.3/build/include/linux/kconfig.h"
    kconfig.parent.mkdir(parents=True)
    assert len(list(headers.trees("", kernel))) == 2  # left over from a removed package
    kconfig.touch()
    assert [path and path.name.split("-")[0] for path in headers.trees("", kernel)] == [
        "reduced",
        "whole",
        None,
    ]
    assert list(headers.trees("", kernel._replace(btf=NOWHERE))) == [None]
    (tmp_path / "1.2.3/source").mkdir()  # then it is there that BCC looks
    assert len(list(headers.trees("", kernel))) == 2
    assert len(list(headers.trees("", kernel._replace(kheaders=kconfig)))) == 3
    assert len(list(cache_root.iterdir())) == 2


@pytest.mark.usefixtures("cache_root")
def test_neither_btf_nor_headers() -> None:
    kernel = headers.Kernel(btf=NOWHERE, modules=NOWHERE, release="1.2.3-x", kheaders=NOWHERE)
    with pytest.raises(UnsupportedError) as caught:
        next(headers.trees(HELLO, kernel))
    message = str(caught.value)
    assert "/nonexistent: No such file or directory" in message
    assert "CONFIG_DEBUG_INFO_BTF=y" in message
    assert "linux-headers-1.2.3-x" in message
    assert "kernel-devel-1.2.3-x" in message


BTF_HEADER = struct.Struct("=HBBIIIII")
UNKNOWN_TYPE = struct.pack("=III", 0, 31 << 24, 0)


@pytest.mark.usefixtures("cache_root")
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty or cut off"),
        (b"\x7fELF" + bytes(60), "not BTF of this machine's byte order"),
        (BTF_HEADER.pack(0xEB9F, 1, 0, 24, 0, 12, 12, 1) + UNKNOWN_TYPE + b"\0", "upgrade ebpfstream"),
        (BTF_HEADER.pack(0xEB9F, 1, 0, 24, 0, 0, 0, 2) + b"xx", r"libbpf\.so\.1 .*could not read .*Invalid"),
    ],
)
def test_btf_that_cannot_be_read(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "vmlinux").write_bytes(data)
    kernel = headers.Kernel(btf=tmp_path / "vmlinux", modules=NOWHERE, kheaders=NOWHERE)
    with pytest.raises(UnsupportedError, match=says):
        next(headers.trees(HELLO, kernel))


@pytest.mark.usefixtures("cache_root")
def test_libbpf_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str | None, **_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", refuse)
    btf._libbpf.cache_clear()
    kernel = headers.Kernel(modules=NOWHERE, kheaders=NOWHERE)
    with pytest.raises(UnsupportedError, match=r"libbpf\.so\.1 .*install libbpf1 \(Debian"):
        next(headers.trees("", kernel))
    assert list(headers.trees("", kernel._replace(kheaders=VMLINUX))) == [None]


def test_a_kernel_is_told_by_its_build_id(tmp_path: Path) -> None:
    def note(name: bytes, kind: int, description: bytes) -> bytes:
        padded = [part + bytes(-len(part) % 4) for part in (name, description)]
        return struct.pack("=III", len(name), len(description), kind) + b"".join(padded)

    notes = tmp_path / "notes"
    notes.write_bytes(
        note(b"Linux\0", 0x101, b"x") + note(b"Xen\0", 3, b"y") + note(b"GNU\0", 3, b"\xab\xcd")
    )
    assert headers.Kernel(notes=notes).identity() == "abcd"
    by_digest = headers.Kernel(notes=NOWHERE).identity()
    assert len(by_digest) == 64
    notes.write_bytes(b"GNU")
    assert headers.Kernel(notes=notes).identity() == by_digest
    # The running kernel's build id says nothing of another's BTF.
    other = tmp_path / "vmlinux"
    other.write_bytes(b"other")
    assert headers.Kernel(btf=other).identity() not in (by_digest, headers.Kernel().identity())


# -------------------------------------------------------------------------------------------- cache


def test_a_hit_reads_no_btf(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list(headers.trees(PARENT))
    assert [path.parent for path in made if path] == [cache_root, cache_root]

    def refuse(*_: object) -> None:
        raise AssertionError("BTF was read")

    monkeypatch.setattr(btf, "Btf", refuse)
    monkeypatch.setattr(btf, "dump", refuse)
    monkeypatch.setattr(headers.Kernel, "types", refuse)
    assert list(headers.trees(PARENT)) == made
    took = []
    for _ in range(20):
        start = time.perf_counter()
        assert next(headers.trees(PARENT)) == made[0]
        took.append(time.perf_counter() - start)
    assert min(took) < 0.005
    with pytest.raises(AssertionError, match="BTF was read"):
        next(headers.trees(PARENT + " "))


def test_what_a_tree_is_kept_for(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(text: str = HELLO, kernel: headers.Kernel | None = None) -> str:
        tree = next(headers.trees(text, kernel))
        assert tree
        return tree.name

    names = [first(), first(HELLO + "\n"), first(HELLO, headers.Kernel(release="1.2.3"))]
    with monkeypatch.context() as patch:
        patch.setattr(headers, "FORMAT", headers.FORMAT + 1)
        names.append(first())
    with monkeypatch.context() as patch:
        patch.setattr(btf, "libbpf_version", lambda: "v9.9")
        names.append(first())
    with monkeypatch.context() as patch:
        patch.setattr(headers.Kernel, "identity", lambda _: "another build")
        names.append(first())
    assert len(set(names)) == len(names) == len(list(cache_root.iterdir()))
    assert first() == names[0]


@pytest.mark.usefixtures("cache_root")
def test_programs_that_take_the_same_names_share_the_whole_tree() -> None:
    assert list(headers.trees(HELLO))[1] == list(headers.trees(HELLO.replace("World", "again")))[1]
    assert list(headers.trees(HELLO))[1] != list(headers.trees(HELLO.replace("data_t", "key")))[1]


def test_the_cache_is_made_for_its_owner_alone(cache_root: Path) -> None:
    old = os.umask(0)
    try:
        next(headers.trees(""))
    finally:
        os.umask(old)
    assert cache_root.stat().st_mode & 0o7777 == 0o700
    assert [path.stat().st_mode & 0o7777 for path in cache_root.iterdir()] == [0o700]


def spoil_symlink(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    root.symlink_to("elsewhere")


def spoil_owner(root: Path) -> None:
    os.chown(root, 65534, 65534)


def spoil_group(root: Path) -> None:
    root.chmod(0o770)


def spoil_others(root: Path) -> None:
    root.chmod(0o1777)


def spoil_parent(root: Path) -> None:
    root.parent.chmod(0o777)


def spoil_kind(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    root.touch()


SPOIL = [spoil_symlink, spoil_owner, spoil_group, spoil_others, spoil_parent, spoil_kind]


@pytest.mark.parametrize("leave", ["exit", "_exit"])
@pytest.mark.parametrize("spoil", SPOIL)
def test_a_cache_that_others_may_write_is_not_used(
    spoil: Callable[[Path], None], leave: str, tmp_path: Path
) -> None:
    if os.geteuid() and spoil is spoil_owner:
        pytest.skip("giving a folder away needs root")
    root = tmp_path / "above" / "cache"
    root.mkdir(mode=0o700, parents=True)
    run = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ebpfstream.kernel import headers
assert headers.cache_directory() is None
tree, whole = headers.trees("int x;")
assert tree == next(headers.trees("int x;")) and tree.parent == whole.parent
assert (tree / "include/linux/kconfig.h").is_file()
assert tree.parent.stat().st_mode & 0o777 == 0o700 and tree.parent.stat().st_uid == os.geteuid()
if os.fork() == 0: sys.exit()
os.wait()
assert tree.exists()
print(tree, flush=True)
if sys.argv[2] == "_exit":
    headers.clean_up()
    os._exit(0)
"""
    spoil(root)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", run, str(ROOT), leave],
        env={**os.environ, "EBPFSTREAM_CACHE": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    tree = Path(done.stdout.splitlines()[-1])
    assert tmp_path not in tree.parents
    assert not tree.parent.exists()  # gone with the process
    kept = root.with_name("elsewhere") if root.with_name("elsewhere").exists() else root
    assert list(kept.iterdir()) == []


@pytest.mark.usefixtures("cache_root")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBPFSTREAM_CACHE", "/proc/1/ebpfstream")
    assert headers.cache_directory() is None
    # A file system that fills up while the tree is written.
    full = tmp_path / "full"
    monkeypatch.setenv("EBPFSTREAM_CACHE", str(full))
    monkeypatch.setattr(headers, "_private_directory", lambda: tmp_path)
    write = headers._write

    def no_space(path: Path, content: str) -> None:
        if full in path.parents and path.name == "version.h":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(headers, "_write", no_space)
    tree = next(headers.trees(""))
    assert tree
    assert tree.parent == tmp_path
    assert list(full.iterdir()) == []
    monkeypatch.setattr(headers, "_private_directory", lambda: full)
    with pytest.raises(UnsupportedError, match=r"No space left on device.*set EBPFSTREAM_CACHE"):
        next(headers.trees(""))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EBPFSTREAM_CACHE", str(tmp_path / "a" / "b"))
    assert headers.cache_directory() == tmp_path / "a" / "b"
    monkeypatch.delenv("EBPFSTREAM_CACHE")
    monkeypatch.setattr(headers, "_trusted", lambda _: True)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert headers.cache_directory() == Path("/var/cache/ebpfstream")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert headers.cache_directory() == tmp_path / "ebpfstream"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").symlink_to(".")
    assert headers.cache_directory() == tmp_path / "ebpfstream"


def test_processes_that_make_the_same_tree_at_once(cache_root: Path) -> None:
    run = """
import sys
sys.path.insert(0, sys.argv[1])
from ebpfstream.kernel import headers
print("ready", flush=True)
sys.stdin.readline()
for tree in headers.trees("int f(struct task_struct *t) { return t->mm->exe_file->f_flags; }"):
    assert (tree / "include/vmlinux.h").read_text().endswith("#endif\\n")
    print(tree)
"""
    command = [sys.executable, "-I", "-S", "-c", run, str(ROOT)]
    running = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    stop = threading.Event()
    incomplete = list[str]()

    def watch() -> None:
        while not stop.is_set():
            for path in cache_root.glob("[rw]*"):
                if not (path / "include/vmlinux.h").is_file() or not (path / "include/asm/page.h").is_file():
                    incomplete.append(path.name)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60) for process in running]
    stop.set()
    watcher.join()
    assert [process.returncode for process in running] == [0] * 6, answers
    assert len({out for out, _ in answers}) == 1
    assert incomplete == []
    assert sorted(path.name.split("-")[0] for path in cache_root.iterdir()) == ["reduced", "whole"]


def test_a_tree_that_could_not_be_finished_is_not_left(cache_root: Path) -> None:
    def build(tree: Path) -> None:
        (tree / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        headers.cached("reduced-x", build)
    assert list(cache_root.iterdir()) == []


def test_pruning(cache_root: Path) -> None:
    def touch(tree: Path) -> None:
        (tree / "file").touch()

    def age(name: str, seconds: float) -> None:
        os.utime(cache_root / name, (time.time() - seconds,) * 2)

    cache_root.mkdir(mode=0o700)
    for number in range(70):
        (cache_root / f"reduced-{number:02}").mkdir()
        age(f"reduced-{number:02}", 4000 + number if number < 65 else 100)
    for name in ("whole-old", ".new-dead", ".new-alive", ".old-dead", "not-ours"):
        (cache_root / name).mkdir()
        age(name, 50 if name == ".new-alive" else 90000)
    # Used again, though it is the oldest: the oldest no more.
    headers.cached("reduced-64", touch)
    headers.cached("reduced-new", touch)
    left = {path.name for path in cache_root.iterdir()}
    # 71, of which 64 stay: those of the last hour (new, 64, 65 … 69), and then the latest.
    assert {name for name in left if name.startswith("reduced-")} == (
        {"reduced-new"} | {f"reduced-{number:02}" for number in (*range(57), *range(64, 70))}
    )
    assert left - {name for name in left if name.startswith("reduced-")} == {
        "whole-old",
        ".new-alive",
        "not-ours",
    }
    # However many there are, those of the last hour stay.
    for number in range(100):
        headers.cached(f"reduced-{number:03}", touch)
    assert {f"reduced-{number:03}" for number in range(100)} < {path.name for path in cache_root.iterdir()}


def test_importing_it_needs_the_standard_library_alone() -> None:
    run = "import sys; sys.path.insert(0, sys.argv[1]); import ebpfstream.kernel.headers; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", run, str(ROOT)], capture_output=True, text=True, check=True
    )
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    assert modules - sys.stdlib_module_names - {"__main__", "_distutils_hack"} == {"ebpfstream"}
    ours = {name for name in done.stdout.split() if name.startswith("ebpfstream.")}
    assert ours == {
        f"ebpfstream.{name}" for name in ("errors", "kernel", "kernel.headers", "kernel.btf", "kernel.shim")
    }
