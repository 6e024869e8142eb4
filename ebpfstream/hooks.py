"""BCC's names for attaching programs, and which hook each means."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

from ebpfstream.errors import ArgumentError, AttachError, UnsupportedError
from ebpfstream.kernel import kprobes, symbols, tracefs
from ebpfstream.kernel.c_text import first_parameter
from ebpfstream.kernel.links import Hook, Kprobe, Link, PerfEvent, RawTracepoint, Tracepoint, Uprobe


class Hooks(ABC):
    """The attaching half of `BPF`: BCC's methods, with BCC's names for their arguments.

    Each returns what keeps the program attached: a Link, whose `close()` detaches and whose `hook`
    says where.  Closing the BPF object closes all of them.

    All raise ArgumentError for a function that the program does not have, AttachError for a hook that
    there is not, each with names that are near; LoadError with what the verifier said;
    PrivilegeError; UnsupportedError for a kind of hook that this kernel does not have.  They take
    some milliseconds.
    """

    _text: str

    @abstractmethod
    def _attach(self, function: str, hook: Hook) -> Link:
        """Load a function as what the hook wants, and attach it there."""

    @abstractmethod
    def _attach_all(self, function: str, hooks: Iterable[Hook], which: str) -> Link:
        """The same for several hooks, as one link; those that cannot be are left out, but not all."""

    def attach_kprobe(
        self, event: str = "", event_off: int = 0, fn_name: str = "", event_re: str = ""
    ) -> Link:
        """To the entry of a kernel function, or `event_off` bytes into it; or of all that `event_re` matches.

        Linux ≥ 4.17 with CONFIG_KPROBE_EVENTS.
        """
        return self._kprobes(event, event_re, fn_name, event_off, returns=False)

    def attach_kretprobe(self, event: str = "", fn_name: str = "", event_re: str = "") -> Link:
        """To the return from a kernel function, or from all that `event_re` matches.

        Linux ≥ 4.17 with CONFIG_KPROBE_EVENTS.
        """
        return self._kprobes(event, event_re, fn_name, 0, returns=True)

    def _kprobes(self, event: str, event_re: str, function: str, offset: int, *, returns: bool) -> Link:
        if not event_re:
            return self._attach(function, Kprobe(_given("event", event), offset, returns))
        found = _matching(event_re, kprobes.functions())
        return self._attach_all(function, [Kprobe(name, 0, returns) for name in found], f"kprobes {event_re}")

    def attach_tracepoint(self, tp: str = "", tp_re: str = "", fn_name: str = "") -> Link:
        """To the tracepoint `category:name`, or to all that `tp_re` matches."""
        if not tp_re:
            return self._attach(fn_name, _tracepoint(_given("tp", tp)))
        hooks = [_tracepoint(name) for name in _matching(tp_re, tracefs.tracepoints())]
        return self._attach_all(fn_name, hooks, f"tracepoints {tp_re}")

    def attach_raw_tracepoint(self, tp: str = "", fn_name: str = "") -> Link:
        """To the raw tracepoint of this name.  Linux ≥ 4.17."""
        return self._attach(fn_name, RawTracepoint(_given("tp", tp)))

    def attach_uprobe(
        self,
        name: str = "",
        sym: str = "",
        sym_re: str = "",
        addr: int | None = None,
        fn_name: str = "",
        pid: int = -1,
        sym_off: int = 0,
    ) -> Link:
        """To the function `sym` of a program or library, to all that `sym_re` matches, or to an address in it.

        `name` is a path, or a library's name without `lib` and `.so`: `c`.  With `pid` that process
        alone.  Linux ≥ 4.17 with CONFIG_UPROBE_EVENTS.
        """
        return self._uprobes(name, sym, sym_re, addr, fn_name, pid, sym_off, returns=False)

    def attach_uretprobe(
        self,
        name: str = "",
        sym: str = "",
        sym_re: str = "",
        addr: int | None = None,
        fn_name: str = "",
        pid: int = -1,
    ) -> Link:
        """To the return from such a function.  Linux ≥ 4.17 with CONFIG_UPROBE_EVENTS."""
        return self._uprobes(name, sym, sym_re, addr, fn_name, pid, 0, returns=True)

    def _uprobes(
        self,
        name: str,
        symbol: str,
        pattern: str,
        address: int | None,
        function: str,
        pid: int,
        offset: int,
        *,
        returns: bool,
    ) -> Link:
        _given("name", name)
        if pattern:
            places = symbols.matching(name, pattern, pid)
            hooks = [Uprobe(path, place, returns, pid) for path, place in places]
            return self._attach_all(function, hooks, f"functions {pattern} of {name}")
        path, place = symbols.resolve(name, symbol or None, address, pid, offset)
        return self._attach(function, Uprobe(path, place, returns, pid))

    def attach_perf_event(
        self,
        ev_type: int,
        ev_config: int,
        fn_name: str = "",
        sample_period: int = 0,
        sample_freq: int = 0,
        pid: int = -1,
        cpu: int = -1,
    ) -> Link:
        """To every `sample_period`th event of a counter, or so that it is `sample_freq` times a second.

        `ev_type` and `ev_config` are perf_event_open(2)'s; without `pid` and `cpu` it is on all CPUs
        that are online.  Linux ≥ 4.9.
        """
        return self._attach(fn_name, PerfEvent(ev_type, ev_config, sample_period, sample_freq, pid, cpu))

    def attach_syscall(self, name: str, fn_name: str = "") -> Link:
        """To the entry of a system call, such as `execve`, by what this kernel has: see the link's `hook`.

        That is a kprobe, or on a kernel without kprobes the tracepoint.  A tracepoint does not hand
        over registers, so on such a kernel a function that takes anything but `void *ctx` is refused.
        """
        if kprobes.kprobes_available():
            return self._attach(fn_name, Kprobe(kprobes.syscall_function(name)))
        hook = Tracepoint("syscalls", f"sys_enter_{name}")
        parameter = first_parameter(self._text, fn_name)
        if parameter is not None and not re.fullmatch(r"void ?\* ?\w*", parameter):
            raise UnsupportedError(
                f"{fn_name} takes {parameter!r}, which a kprobe hands over and this kernel has none; its {hook} hands "
                "over something else. Take `void *ctx` if the function does not look at it, or write "
                f"TRACEPOINT_PROBE(syscalls, sys_enter_{name}), which has the call's arguments in args"
            )
        return self._attach(fn_name, hook)

    @staticmethod
    def get_syscall_fnname(name: str) -> str:
        """The kernel's function of a system call: `execve` is `__x64_sys_execve` on x86-64."""
        return kprobes.syscall_function(name)

    def _own_hook(self, function: str) -> Hook | None:
        """The hook that a function's name says, as BCC reads it; None if it says none."""
        kind, _, rest = function.partition("__")
        match kind:
            case "kprobe" | "kretprobe":
                return Kprobe(kprobes.fix_syscall_function(rest), returns=kind == "kretprobe")
            case "tracepoint":
                return Tracepoint(*rest.split("__", 1)) if "__" in rest else None
            case "raw_tracepoint":
                return RawTracepoint(rest)
            case "kfunc" | "kretfunc" | "kmod_ret" | "lsm" | "bpf_iter":
                raise UnsupportedError(
                    f"{function}: {kind} programs are not supported; use a kprobe, tracepoint or raw tracepoint"
                )
        return None


def _tracepoint(name: str) -> Tracepoint:
    category, colon, event = name.partition(":")
    if not colon:
        raise ArgumentError(
            f"{name!r} is no tracepoint: give category:name, such as syscalls:sys_enter_execve"
        )
    return Tracepoint(category, event)


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those whose beginning a regular expression matches, as in BCC."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"{pattern!r} is no regular expression: {error}") from error
    found = sorted({name for name in names if compiled.match(name)})
    if not found:
        raise AttachError(f"nothing that could be attached to matches {pattern!r}")
    return found


def _given(argument: str, value: str) -> str:
    if not value:
        raise ArgumentError(f"say where to attach: {argument}=")
    return value
