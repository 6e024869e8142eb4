"""The programs of a user's text: loaded when they are first needed, attached, called by one another."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from threading import RLock

from ebpfstream.errors import ArgumentError, AttachError, LoadError
from ebpfstream.kernel import compiler
from ebpfstream.kernel.bpf import Map, MapType, Program, ProgramType, map_numbers
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import Hook, Link, program_type
from ebpfstream.names import did_you_mean, near


class UserPrograms:
    """Owns what is loaded and attached of a module; may be used by several threads."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._lock = RLock()
        self._loaded: dict[tuple[str, ProgramType], Program] = {}
        self._links: list[Link] = []
        self._calls: dict[str, dict[int, str]] = {}  # functions to be called, by program array and index

    def attach(self, function: str, hook: Hook) -> Link:
        """Load a function as what the hook wants, and attach it there."""
        with self._lock:
            link = Link.attach(self._load(function, program_type(hook)), hook)
            self._links.append(link)
            return link

    def attach_all(self, function: str, hooks: Iterable[Hook], which: str) -> Link:
        """The same for several hooks, as one link; those that cannot be are left out, but not all."""
        links: list[Link] = []
        for hook in hooks:
            try:
                links.append(self.attach(function, hook))
            except AttachError as error:
                failure = error
        if not links:
            raise AttachError(f"none of the {which} can be attached to; the last one: {failure}")
        return Link.joined(links)

    def detach(self) -> None:
        """Take all of them off their hooks."""
        with self._lock:
            for link in self._links:
                link.close()
            self._links.clear()

    def close(self) -> None:
        """Detach all, and give them up."""
        with self._lock:
            self.detach()
            for program in self._loaded.values():
                program.close()

    def tail_calls(self, name: str, functions: Mapping[int, str]) -> None:
        """What `BPF.tail_calls` does."""
        maps = self._module.maps
        if name not in maps or maps[name].type is not MapType.PROG_ARRAY:
            arrays = [known for known, made in maps.items() if made.type is MapType.PROG_ARRAY]
            raise ArgumentError(
                f"the program declares no program array {name!r}{did_you_mean(near(name, arrays))} "
                f"(it has {', '.join(arrays) or 'none'}: BPF_PROG_ARRAY declares one)"
            )
        entries = maps[name].max_entries
        for index, function in functions.items():
            self._check(function)
            if not 0 <= index < entries:
                raise ArgumentError(
                    f"index {index} for {function!r} is out of range: {name!r} has {entries} entries, 0 to "
                    f"{entries - 1}; declare it larger, BPF_PROG_ARRAY({name}, {index + 1})"
                )
        with self._lock:
            for caller, kind in list(self._loaded):
                if name in self._uses(caller):
                    self._fill(name, kind, functions)
                    break
            self._calls.setdefault(name, {}).update(functions)

    def _fill(self, name: str, kind: ProgramType, functions: Mapping[int, str]) -> None:
        programs = {index: self._load(function, kind) for index, function in functions.items()}
        for index, program in programs.items():
            self._module.maps[name].update(struct.pack("<I", index), struct.pack("<I", program.fd))

    def _load(self, function: str, kind: ProgramType) -> Program:
        self._check(function)
        if (function, kind) not in self._loaded:
            module = self._module
            if compiler.has_unwritten_calls(module.functions[function]):
                raise LoadError(
                    f"{function} calls a method of a map (such as lookup, update or perf_submit) in an included "
                    "file or a macro. BCC rewrites those in the program's own text alone: move that code there, as a "
                    "static inline function"
                )
            self._loaded[function, kind] = Program.load(
                function,
                kind,
                module.functions[function],
                module.numbered,
                license=module.license,
                kernel_version=module.kernel_version,
            )
            for name in self._uses(function):
                if name in self._calls:
                    self._fill(name, kind, self._calls[name])
        return self._loaded[function, kind]

    def _check(self, function: str) -> None:
        functions = self._module.functions
        if function not in functions:
            raise ArgumentError(
                f"there is no function {function!r} in the program{did_you_mean(near(function, functions))} "
                f"(it has {', '.join(sorted(functions)) or 'none'})"
            )

    def submitting_to(self, output: Map) -> tuple[list[Program], list[Link]]:
        """Those that submit to an output, or call one that does, and where they are attached."""
        reached = {function for function, _ in self._loaded if self._reaches(function, output, set())}
        programs = [program for (function, _), program in self._loaded.items() if function in reached]
        return programs, [link for link in self._links if link.program_name in reached]

    def _reaches(self, function: str, output: Map, seen: set[str]) -> bool:
        seen.add(function)
        used = self._uses(function)
        called = {callee for name in used for callee in self._calls.get(name, {}).values()} - seen
        return any(self._module.maps[name] is output for name in used) or any(
            self._reaches(callee, output, seen) for callee in called
        )

    def _uses(self, function: str) -> set[str]:
        """The names of the maps that a function uses itself."""
        module = self._module
        used = [module.numbered[number] for number in map_numbers(module.functions[function])]
        return {name for name, made in module.maps.items() if any(made is one for one in used)}
