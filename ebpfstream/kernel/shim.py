"""What stands in for kernel headers besides the kernel's types, and what a program's text asks of it.

BTF knows types and enumerators; macros it does not know.  BCC tests include/linux/kconfig.h to tell
whether a folder holds kernel headers, and includes it before anything else; from there comes all.
"""

from __future__ import annotations

import errno
import re
from signal import Signals
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from typing import Final


class Program(NamedTuple):
    """What a program's C text says of itself, preprocessor directives not followed."""

    identifiers: frozenset[str]
    #: Names of the structs, unions and enums that it defines.
    tags: frozenset[str]
    #: What else it defines that a typedef or an enumerator would clash with.
    ordinary: frozenset[str]
    #: The macros of `MACROS` that it defines itself.
    macros: frozenset[str]
    #: The macros of `_MEMBERS` that it uses, and does not use the names for members of its own.
    members: frozenset[str]
    #: The headers that it includes in angle brackets and that must be there, if only empty.
    includes: frozenset[str]


COMMENT_OR_LITERAL = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
_ATTRIBUTE = re.compile(
    r"\b(?:__packed|__maybe_unused|__always_inline|noinline|__user|__kernel|__rcu|__percpu)\b"
    r"|\b__aligned\s*\([^()]*\)"
    r"|__attribute__\s*\(\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\)"
)
_TAG = re.compile(r"\b(?:struct|union|enum)\s+(?:[A-Za-z_]\w*\s+)*?([A-Za-z_]\w*)\s*\{")
_ENUM = re.compile(r"\benum\b[^;{}()]*\{([^{}]*)\}")
_ENUMERATOR = re.compile(r"\s*([A-Za-z_]\w*)")
_FUNCTION_POINTER = re.compile(r"\(\s*\*+\s*(?:const\s+)?([A-Za-z_]\w*)")
_FUNCTION = re.compile(r"\b([A-Za-z_]\w*)\s*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\s*\{")
# BPF_HASH(name, …), but BPF_TABLE("hash", key, leaf, name, …)
_MAP = re.compile(r"\bBPF_\w+\s*\(\s*(?:\"\"\s*,[^,()]+,[^,()]+,\s*)?([A-Za-z_]\w*)")
_VARIABLE = re.compile(r"(?:\b([A-Za-z_]\w*)[\s*]+|\}\s*)([A-Za-z_]\w*)\s*(?=[;=\[])")


def read_program(text: str) -> Program:
    """Find what matters in C text, comments and literals left out."""
    text = re.sub(r"\\\r?\n", " ", text)
    text = COMMENT_OR_LITERAL.sub(lambda found: '""' if found[0][0] == '"' else " ", text)
    identifiers = set(re.findall(r"[A-Za-z_]\w*", text))
    # BCC's macro pastes the name of its argument's type together.
    identifiers.update("bpf_iter__" + target for target in re.findall(r"\bBPF_ITER\s*\(\s*(\w+)", text))
    todo = identifiers & _MEANINGS.keys()
    while todo:  # what a macro means must be reached as well
        meant = set(re.findall(r"[A-Za-z_]\w*", " ".join(_MEANINGS[name] for name in todo)))
        todo = (meant - identifiers) & _MEANINGS.keys()
        identifiers |= meant
    code = _ATTRIBUTE.sub(" ", re.sub(r"(?m)^[ \t]*#.*$", "", text))
    return Program(
        identifiers=frozenset(identifiers),
        tags=frozenset(_TAG.findall(code)),
        ordinary=frozenset(_ordinary(code)),
        macros=frozenset(re.findall(r"(?m)^[ \t]*#[ \t]*define[ \t]+(\w+)", text)) & _MACRO_NAMES,
        members=frozenset(identifiers & _MEMBERS.keys() - set(_OWN_MEMBER.findall(code))),
        includes=frozenset(filter(_stubbed, re.findall(r"(?m)^[ \t]*#[ \t]*include[ \t]*<([^>\n]+)>", text))),
    )


def _ordinary(code: str) -> set[str]:
    names = set[str]()
    for body in _ENUM.findall(code):
        names.update(found[1] for part in body.split(",") if (found := _ENUMERATOR.match(part)))
    for found in re.finditer(r"\btypedef\b", code):
        names.update(_declarators(_without_bodies(code[found.end() :], stop=";")))
    outside = _without_bodies(code)
    names.update(_FUNCTION.findall(outside))
    names.update(_MAP.findall(outside))
    names.update(name for before, name in _VARIABLE.findall(outside) if before not in _TAG_KEYWORDS)
    return names


_TAG_KEYWORDS = frozenset({"struct", "union", "enum"})


def _declarators(declaration: str) -> list[str]:
    """Return the names that `typedef <declaration>;` defines."""
    if found := _FUNCTION_POINTER.search(declaration):
        return [found[1]]
    flat = re.sub(r"\([^()]*\)|\[[^\]]*\]", " ", declaration)
    return [words[-1] for part in flat.split(",") if (words := re.findall(r"[A-Za-z_]\w*", part))]


def _without_bodies(code: str, stop: str = "") -> str:
    """Return the code outside of all braces; up to the first `stop` there, if one is given."""
    depth, kept = 0, list[str]()
    for piece in re.split(r"([{};])", code):
        if piece == "}":
            depth = max(depth - 1, 0)
        if depth == 0:
            if piece and piece == stop:
                break
            kept.append(piece)
        if piece == "{":
            depth += 1
    return "".join(kept)


#: Force-included first.  What it includes comes from its own folder before any other (C11 6.10.2,
#: and clang's rule for quotes), so a vmlinux.h in the user's folder, which BCC searches first for
#: everything else, cannot take its place.  It guards itself by the name that bpftool gives its own:
#: a program that brings one along gets these types.
KCONFIG: Final = """\
#ifndef EBPFSTREAM_KCONFIG_H
#define EBPFSTREAM_KCONFIG_H
#include "../vmlinux.h"
/* BCC brings the system call interface of its own age along; the kernel's enums are there already. */
#define _UAPI__LINUX_BPF_H__
/* BCC's prototypes point to these. */
struct __sk_buff; struct bpf_dynptr; struct bpf_map; struct bpf_perf_event_data; struct bpf_pidns_info;
struct bpf_raw_tracepoint_args; struct bpf_redir_neigh; struct bpf_sock; struct bpf_sock_ops;
struct bpf_sock_tuple; struct bpf_spin_lock; struct bpf_sysctl; struct bpf_tcp_sock; struct bpf_timer;
struct btf_ptr; struct cgroup; struct file; struct inode; struct iphdr; struct ipv6hdr;
struct linux_binprm; struct mptcp_sock; struct path; struct pt_regs; struct seq_file; struct sk_buff;
struct socket; struct task_struct; struct tcp6_sock; struct tcp_request_sock; struct tcp_sock;
struct tcp_timewait_sock; struct tcphdr; struct udp6_sock; struct unix_sock; struct xdp_md;
#include "autoconf.h"
/* True of every kernel with BTF (x86: arch/x86/Kconfig, arm64: arch/arm64/Kconfig). */
#ifndef CONFIG_BPF_SYSCALL
#define CONFIG_BPF_SYSCALL 1
#endif
#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(CONFIG_ARCH_HAS_SYSCALL_WRAPPER)
#define CONFIG_ARCH_HAS_SYSCALL_WRAPPER 1
#endif
#include "macros.h"
/* Functions that headers define are not here: better no program than one that calls into nowhere. */
#pragma clang diagnostic error "-Wimplicit-function-declaration"
#endif
"""

#: Macros of kernel headers that programs use, kept unless the program or the kernel's enums have the name.
MACROS: Final = """\
#define NULL ((void *)0)
#define __always_inline inline __attribute__((always_inline))
#define noinline __attribute__((noinline))
#define memcpy(a, b, size) __builtin_memcpy(a, b, size)
#define memmove(a, b, size) __builtin_memmove(a, b, size)
#define memset(a, b, size) __builtin_memset(a, b, size)
#define memcmp(a, b, size) __builtin_memcmp(a, b, size)
#define strlen(text) __builtin_strlen(text)
#define __packed __attribute__((packed))
#define __aligned(x) __attribute__((aligned(x)))
#define __maybe_unused __attribute__((unused))
#define __user
#define __kernel
#define __force
#define __rcu
#define __percpu
#define __iomem
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define barrier() __asm__ __volatile__("" ::: "memory")
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define BIT(n) (1UL << (n))
#define offsetof(type, member) __builtin_offsetof(type, member)
#define container_of(p, type, member) ((type *)((void *)(p) - __builtin_offsetof(type, member)))
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define min_t(type, a, b) ((type)(a) < (type)(b) ? (type)(a) : (type)(b))
#define max_t(type, a, b) ((type)(a) > (type)(b) ? (type)(a) : (type)(b))
#define BTF_COMMA_1 0,
#define BTF_SECOND_OF(first, second, ...) second
#define BTF_IS_ONE__(junk) BTF_SECOND_OF(junk 1, 0, 0)
#define BTF_IS_ONE_(value) BTF_IS_ONE__(BTF_COMMA_##value)
#define BTF_IS_ONE(value) BTF_IS_ONE_(value)
#define IS_BUILTIN(option) BTF_IS_ONE(option)
#define IS_MODULE(option) BTF_IS_ONE(option##_MODULE)
#define IS_ENABLED(option) (BTF_IS_ONE(option) || BTF_IS_ONE(option##_MODULE))
#define inet_sk(sk) ((struct inet_sock *)(sk))
#define inet_csk(sk) ((struct inet_connection_sock *)(sk))
#define tcp_sk(sk) ((struct tcp_sock *)(sk))
#define udp_sk(sk) ((struct udp_sock *)(sk))
#define div_u64(dividend, divisor) ((u64)(dividend) / (u32)(divisor))
#define div64_u64(dividend, divisor) ((u64)(dividend) / (u64)(divisor))
#define ntohs(x) __builtin_bswap16(x)
#define htons(x) __builtin_bswap16(x)
#define ntohl(x) __builtin_bswap32(x)
#define htonl(x) __builtin_bswap32(x)
#define be16_to_cpu(x) __builtin_bswap16(x)
#define be32_to_cpu(x) __builtin_bswap32(x)
#define be64_to_cpu(x) __builtin_bswap64(x)
#define cpu_to_be16(x) __builtin_bswap16(x)
#define cpu_to_be32(x) __builtin_bswap32(x)
#define cpu_to_be64(x) __builtin_bswap64(x)
#define TASK_COMM_LEN 16
#define NAME_MAX 255
#define PATH_MAX 4096
#define USEC_PER_SEC 1000000L
#define NSEC_PER_USEC 1000L
#define NSEC_PER_MSEC 1000000L
#define NSEC_PER_SEC 1000000000L
#define AF_UNSPEC 0
#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define AF_NETLINK 16
#define SCM_RIGHTS 1
#define IFNAMSIZ 16
#define ETH_ALEN 6
#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ETH_P_IPV6 0x86DD
#define O_RDONLY 0
#define O_WRONLY 1
#define O_RDWR 2
#define O_CREAT 0100
#define O_TRUNC 01000
#define FMODE_CREATED 0x100000
#define CLONE_THREAD 0x00010000
#define PF_KTHREAD 0x00200000
#define TASK_RUNNING 0
#define TASK_INTERRUPTIBLE 1
#define TASK_UNINTERRUPTIBLE 2
#define S_IFMT 00170000
#define S_IFSOCK 0140000
#define S_IFLNK 0120000
#define S_IFREG 0100000
#define S_IFBLK 0060000
#define S_IFDIR 0040000
#define S_IFCHR 0020000
#define S_IFIFO 0010000
#define S_ISREG(mode) (((mode) & S_IFMT) == S_IFREG)
#define S_ISDIR(mode) (((mode) & S_IFMT) == S_IFDIR)
#define S_ISLNK(mode) (((mode) & S_IFMT) == S_IFLNK)
#define S_ISSOCK(mode) (((mode) & S_IFMT) == S_IFSOCK)
#define DISK_NAME_LEN 32
#define REQ_OP_BITS 8
#define REQ_OP_MASK ((1 << REQ_OP_BITS) - 1)
#define TC_ACT_OK 0
#define TC_ACT_SHOT 2
#define BPF_ANY 0
#define BPF_NOEXIST 1
#define BPF_EXIST 2
#define BPF_F_NO_PREALLOC 1
#define BPF_F_STACK_BUILD_ID 32
#define BPF_F_SKIP_FIELD_MASK 0xffULL
#define BPF_F_USER_STACK 256
#define BPF_F_FAST_STACK_CMP 512
#define BPF_F_REUSE_STACKID 1024
#define BPF_F_INDEX_MASK 0xffffffffULL
#define BPF_F_CURRENT_CPU 0xffffffffULL
"""

_MACRO = re.compile(r"(?m)^#define (\w+)")
_MACRO_NAMES = frozenset(_MACRO.findall(MACROS))

# Members that have names of their own, unless the kernel's types have that name themselves:
# include/net/sock.h, inet_sock.h, request_sock.h; include/uapi/linux/in6.h; include/linux/dcache.h (6.14).
_OF_SOCK_COMMON: Final = """\
addrpair bound_dev_if cookie daddr dport family flags hash incoming_cpu ipv6only net net_refcnt num portpair
prot rcv_saddr refcnt reuse reuseport rx_queue_mapping state tx_queue_mapping v6_daddr v6_rcv_saddr
"""
_MEMBERS: Final = {
    **{f"sk_{name}": f"__sk_common.skc_{name}" for name in _OF_SOCK_COMMON.split()},
    **{f"inet_{name}": f"sk.__sk_common.skc_{name}" for name in ("daddr", "dport", "num", "rcv_saddr")},
    "ir_loc_addr": "req.__req_common.skc_rcv_saddr",
    "ir_num": "req.__req_common.skc_num",
    "ir_rmt_addr": "req.__req_common.skc_daddr",
    "ir_rmt_port": "req.__req_common.skc_dport",
    "ir_v6_loc_addr": "req.__req_common.skc_v6_rcv_saddr",
    "ir_v6_rmt_addr": "req.__req_common.skc_v6_daddr",
    "s6_addr": "in6_u.u6_addr8",
    "s6_addr16": "in6_u.u6_addr16",
    "s6_addr32": "in6_u.u6_addr32",
    "d_iname": "d_shortname.string",
}
# Where one of these is declared, and not used behind a dot or an arrow.
_OWN_MEMBER = re.compile(rf"(?:[\w*]\s*|,\s*(?=\w+\s*[;=\[:]))\b({'|'.join(_MEMBERS)})\b")
# DNAME_INLINE_LEN is the size of a member, before and since Linux 6.14.  It must be a number, since BCC
# cannot tell the type of an array that is sizeof() something long.
_DNAME_INLINE_LEN = re.compile(
    r"\bd_iname\[(\d+)\]|\bunion shortname_store \{\s*unsigned char string\[(\d+)\]"
)
# What the macros that take no arguments stand for.
_MEANINGS: Final = {
    **_MEMBERS,
    **dict(re.findall(r"(?m)^#define (\w+) (.*)", MACROS)),
    "DNAME_INLINE_LEN": "dentry",
}

#: BPF_FUNC_*, in the order of __BPF_FUNC_MAPPER in include/uapi/linux/bpf.h: the first is 1.  BCC's
#: headers name all of them that were known when it was made, whatever the running kernel has.  The
#: list is closed: what came later are kfuncs.
HELPERS: Final = """\
map_lookup_elem map_update_elem map_delete_elem probe_read ktime_get_ns trace_printk get_prandom_u32
get_smp_processor_id skb_store_bytes l3_csum_replace l4_csum_replace tail_call clone_redirect
get_current_pid_tgid get_current_uid_gid get_current_comm get_cgroup_classid skb_vlan_push skb_vlan_pop
skb_get_tunnel_key skb_set_tunnel_key perf_event_read redirect get_route_realm perf_event_output
skb_load_bytes get_stackid csum_diff skb_get_tunnel_opt skb_set_tunnel_opt skb_change_proto
skb_change_type skb_under_cgroup get_hash_recalc get_current_task probe_write_user
current_task_under_cgroup skb_change_tail skb_pull_data csum_update set_hash_invalid get_numa_node_id
skb_change_head xdp_adjust_head probe_read_str get_socket_cookie get_socket_uid set_hash setsockopt
skb_adjust_room redirect_map sk_redirect_map sock_map_update xdp_adjust_meta perf_event_read_value
perf_prog_read_value getsockopt override_return sock_ops_cb_flags_set msg_redirect_map msg_apply_bytes
msg_cork_bytes msg_pull_data bind xdp_adjust_tail skb_get_xfrm_state get_stack skb_load_bytes_relative
fib_lookup sock_hash_update msg_redirect_hash sk_redirect_hash lwt_push_encap lwt_seg6_store_bytes
lwt_seg6_adjust_srh lwt_seg6_action rc_repeat rc_keydown skb_cgroup_id get_current_cgroup_id
get_local_storage sk_select_reuseport skb_ancestor_cgroup_id sk_lookup_tcp sk_lookup_udp sk_release
map_push_elem map_pop_elem map_peek_elem msg_push_data msg_pop_data rc_pointer_rel spin_lock spin_unlock
sk_fullsock tcp_sock skb_ecn_set_ce get_listener_sock skc_lookup_tcp tcp_check_syncookie sysctl_get_name
sysctl_get_current_value sysctl_get_new_value sysctl_set_new_value strtol strtoul sk_storage_get
sk_storage_delete send_signal tcp_gen_syncookie skb_output probe_read_user probe_read_kernel
probe_read_user_str probe_read_kernel_str tcp_send_ack send_signal_thread jiffies64 read_branch_records
get_ns_current_pid_tgid xdp_output get_netns_cookie get_current_ancestor_cgroup_id sk_assign
ktime_get_boot_ns seq_printf seq_write sk_cgroup_id sk_ancestor_cgroup_id ringbuf_output ringbuf_reserve
ringbuf_submit ringbuf_discard ringbuf_query csum_level skc_to_tcp6_sock skc_to_tcp_sock
skc_to_tcp_timewait_sock skc_to_tcp_request_sock skc_to_udp6_sock get_task_stack load_hdr_opt
store_hdr_opt reserve_hdr_opt inode_storage_get inode_storage_delete d_path copy_from_user snprintf_btf
seq_printf_btf skb_cgroup_classid redirect_neigh per_cpu_ptr this_cpu_ptr redirect_peer task_storage_get
task_storage_delete get_current_task_btf bprm_opts_set ktime_get_coarse_ns ima_inode_hash sock_from_file
check_mtu for_each_map_elem snprintf sys_bpf btf_find_by_name_kind sys_close timer_init
timer_set_callback timer_start timer_cancel get_func_ip get_attach_cookie task_pt_regs
get_branch_snapshot trace_vprintk skc_to_unix_sock kallsyms_lookup_name find_vma loop strncmp
get_func_arg get_func_ret get_func_arg_cnt get_retval set_retval xdp_get_buff_len xdp_load_bytes
xdp_store_bytes copy_from_user_task skb_set_tstamp ima_file_hash kptr_xchg map_lookup_percpu_elem
skc_to_mptcp_sock dynptr_from_mem ringbuf_reserve_dynptr ringbuf_submit_dynptr ringbuf_discard_dynptr
dynptr_read dynptr_write dynptr_data tcp_raw_gen_syncookie_ipv4 tcp_raw_gen_syncookie_ipv6
tcp_raw_check_syncookie_ipv4 tcp_raw_check_syncookie_ipv6 ktime_get_tai_ns user_ringbuf_drain
cgrp_storage_get cgrp_storage_delete
"""

_SIGRTMIN: Final = 32  # the kernel's; include/uapi/asm-generic/signal.h

_VERSION = """\
#define LINUX_VERSION_CODE {code}
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
"""
_LOG2 = """\
#define ilog2(n) (63 - __builtin_clzl(n))
#define roundup_pow_of_two(n) ((n) <= 1 ? 1UL : 1UL << (64 - __builtin_clzl((n) - 1UL)))
"""
_PAGE = """\
#define PAGE_SHIFT {shift}
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PAGE_MASK (~(PAGE_SIZE - 1))
#if defined(__x86_64__)  /* the least that there is without randomization: the variable cannot be read here */
#define __PAGE_OFFSET_BASE_L4 0xffff888000000000UL
#define __PAGE_OFFSET_BASE_L5 0xff11000000000000UL
#define PAGE_OFFSET __PAGE_OFFSET_BASE_L4
#elif defined(__aarch64__) && defined(CONFIG_ARM64_VA_BITS)
#define PAGE_OFFSET (-(1UL << CONFIG_ARM64_VA_BITS))
#endif
"""

# BCC's own headers include the first three.  The others are what programs include by habit; files
# that a program includes in quotes are not read here, and may include them too.
_EMPTY = """\
uapi/linux/bpf.h uapi/linux/if_packet.h uapi/linux/if_ether.h
linux/binfmts.h linux/blk-mq.h linux/blkdev.h linux/bpf.h linux/bpf_common.h linux/cgroup.h linux/cred.h
linux/dcache.h linux/fs.h linux/fs_struct.h linux/if_ether.h linux/if_packet.h linux/in.h linux/in6.h
linux/ip.h linux/ipv6.h linux/kdev_t.h linux/kernel.h linux/ktime.h linux/limits.h linux/list.h
linux/mm_types.h linux/mount.h linux/net.h linux/netdevice.h linux/ns_common.h linux/nsproxy.h
linux/pid_namespace.h linux/ptrace.h linux/sched.h linux/security.h linux/signal.h linux/skbuff.h
linux/socket.h linux/string.h linux/tcp.h linux/time64.h linux/types.h linux/uaccess.h linux/udp.h
linux/utsname.h net/inet_sock.h net/net_namespace.h net/sock.h uapi/linux/in.h uapi/linux/ip.h
uapi/linux/pkt_cls.h uapi/linux/ptrace.h uapi/linux/tcp.h uapi/linux/udp.h
"""

# C's own that say what the kernel's types have said already; <stdarg.h> is clang's, which BCC has.
_C_HEADERS = frozenset({"stdbool.h", "stddef.h", "stdint.h"})


def _stubbed(name: str) -> bool:
    folder, slash, _ = name.partition("/")
    if not re.fullmatch(r"[\w.+/-]+\.h", name) or ".." in name.split("/"):
        return False
    # BCC has bcc/ itself; libbpf's bpf/ means another dialect, and an error that says so is better.
    return name in _C_HEADERS or (
        bool(slash) and folder not in {"", "bcc", "bpf"} and name not in _EMPTY.split()
    )


def files(
    vmlinux: str, program: Program, *, release: str, page_size: int, options: Iterable[tuple[str, str]] = ()
) -> dict[str, str]:
    """Every file below include/, by name, for this program.

    `vmlinux` holds the kernel's types as C; `release` is `uname -r`; `options` are the kernel's
    CONFIG_ options, as far as they are known.
    """
    taken = {*re.findall(r"(?m)^\t+(\w+) = ", vmlinux), *program.ordinary, *program.macros}
    tree = dict.fromkeys([*_EMPTY.split(), *program.includes], "")
    tree |= {
        "vmlinux.h": f"#ifndef __VMLINUX_H__\n#define __VMLINUX_H__\n{vmlinux}#endif\n",
        "linux/kconfig.h": KCONFIG,
        "linux/autoconf.h": _autoconf(options),
        "linux/macros.h": _macros(taken) + _members(program.members, vmlinux),
        "linux/version.h": _VERSION.format(code=_version_code(release)),
        "linux/log2.h": _LOG2,
        "asm/page.h": _PAGE.format(shift=page_size.bit_length() - 1),
    }
    return tree


def _macros(taken: Container[str]) -> str:
    lines = [line for line in MACROS.splitlines() if _MACRO.findall(line)[0] not in taken]
    helpers = (("BPF_FUNC_" + name, number) for number, name in enumerate(HELPERS.split(), 1))
    numbers = ((name, number) for name, number in vars(errno).items() if name.startswith("E"))
    signals = ((signal.name, signal.value) for signal in Signals if signal < _SIGRTMIN)
    lines += [
        f"#define {name} {number}" for name, number in (*helpers, *numbers, *signals) if name not in taken
    ]
    return "\n".join(lines) + "\n"


def _members(used: Iterable[str], vmlinux: str) -> str:
    names = sorted(name for name in used if not re.search(rf"\b{name}\b", vmlinux))
    lines = [f"#define {name} {_MEMBERS[name]}\n" for name in names]
    if found := _DNAME_INLINE_LEN.search(vmlinux):
        lines.append(f"#define DNAME_INLINE_LEN {found[1] or found[2]}\n")
    return "".join(lines)


def _autoconf(options: Iterable[tuple[str, str]]) -> str:
    """As scripts/kconfig/confdata.c writes it."""
    lines = []
    for name, value in options:
        if value == "m":
            lines.append(f"#define {name}_MODULE 1")
        else:
            lines.append(f"#define {name} {'1' if value == 'y' else value}")
        if name == "CONFIG_HZ":
            lines.append(f"#define HZ {value}")
    return "\n".join(lines) + "\n"


def _version_code(release: str) -> int:
    """LINUX_VERSION_CODE, as the top Makefile makes it; some distributions leave the third number out."""
    numbers = [int(number) for number in re.findall(r"\d+", release.partition("-")[0])]
    major, minor, patch, *_ = *numbers, 0, 0, 0
    return (major << 16) + (minor << 8) + min(patch, 255)
