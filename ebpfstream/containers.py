r"""Which container a cgroup belongs to, told by the cgroup's path.

Container runtimes give each container a cgroup and name it after the container; the kernel knows
of no containers.  So what is found here is what whoever made the cgroup called it: who may make
cgroups below a container's own can make them look like further containers.

Recognized, wherever they lie, the innermost first:

- 64 hexadecimal digits, alone or after a prefix that ends in `-` or `:`, and as a systemd scope:
  Docker, containerd's CRI, CRI-O, Podman, ECS; but not their monitors (`libpod-conmon-…`);
- systemd-nspawn's and libvirt-lxc's machines by their names, but not libvirt's virtual machines;
- LXC's, Incus's and LXD's containers by their names;
- containerd's own `/<namespace>/<id>` at the root, for its usual namespaces.
"""

from __future__ import annotations

import os
import re
from typing import Final

from ebpfstream import text
from ebpfstream.kernel import cgroups

_CACHED: Final = 8192
"""Cgroups whose containers are remembered: at most some 2 MB."""

# `docker-<id>.scope`, `kubepods-….slice:cri-containerd:<id>`, or `<id>` alone.  No other units:
# Podman runs health checks outside of the container as `<id>-<number>.service`.
_HEXADECIMAL: Final = re.compile(r"(?:(.*)[-:])?([0-9a-f]{64})(?:\.scope)?", re.DOTALL)
# systemd-machined's scope, and the service that machinectl(1) starts.
_MACHINE: Final = re.compile(r"machine-(.+)\.scope|systemd-nspawn@(.+)\.service", re.DOTALL)
# libvirt calls a virtual machine so (virDomainDriverGenerateMachineName()); its processes are the host's.
_VIRTUAL: Final = re.compile(r"qemu-[0-9]+-.*", re.DOTALL)
_SYSTEMD_ESCAPE: Final = re.compile(rb"\\x([0-9a-f]{2})")
_CONTAINERD_NAMESPACES: Final = {"default", "k8s.io", "moby"}
_LXC_PREFIX: Final = "lxc.payload."  # its monitors are in `lxc.monitor.…`
_LXC_FOLDERS: Final = {"lxc", "lxc.payload"}  # LXC before 3.1, and Proxmox; LXC 3.1


def of_cgroup(cgroup_id: int) -> str | None:
    """The id of the container that a cgroup of this id belongs to; None for what is in none.

    None as well if the cgroup was gone before it was first asked for, or cannot be seen: see
    `cgroups.path_of`, which says what a first look costs.  An answer is remembered, None included:
    ids are not given twice and cgroups of v2 not renamed, so each is final.  Only if descriptors or
    memory have run out, None is for now.  Raises nothing.
    """
    return _ids[cgroup_id]


def container_id(path: str) -> str | None:
    """The id or name of the container that owns the cgroup of this path; None if none does.

    `path` begins at the root of the cgroup hierarchy: "/system.slice/docker-<id>.scope/init".
    """
    found = None
    # What one level of containers holds begins here: with the root, then after each container.
    top = 0
    parts = path.strip("/").split("/")
    for index, part in enumerate(parts):
        folder = parts[index - 1] if index > top else ""
        child = parts[index + 1] if index + 1 < len(parts) else ""
        name = _hexadecimal(part, folder, child) or _machine(part, child) or _lxc(part, folder)
        if not name and folder in _CONTAINERD_NAMESPACES and index == top + 1:
            name = part
        if name:
            found, top = name, index + 1
    # Events hold no surrogate escapes, which cannot be printed.
    return None if found is None else text.decode(os.fsencode(found))


def _hexadecimal(part: str, folder: str, child: str) -> str | None:
    match = _HEXADECIMAL.fullmatch(part)
    if match is None or (match[1] and match[1].endswith("conmon")):
        return None
    if folder == "libpod_parent" and child == "conmon":  # a pod of Podman's, and its monitors
        return None
    return match[2]


def _machine(part: str, child: str) -> str | None:
    match = _MACHINE.fullmatch(part)
    # systemd-nspawn itself is in `supervisor`, the container in `payload` (src/nspawn/nspawn-cgroup.c).
    if match is None or child == "supervisor":
        return None
    escaped = os.fsencode(match[1] or match[2])
    name = os.fsdecode(_SYSTEMD_ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), escaped))
    return None if _VIRTUAL.fullmatch(name) else name


def _lxc(part: str, folder: str) -> str | None:
    if part.startswith(_LXC_PREFIX):
        return part.removeprefix(_LXC_PREFIX)
    return part if folder in _LXC_FOLDERS else None


class _Ids(dict[int, str | None]):
    """Containers by the ids of their cgroups."""

    def __missing__(self, cgroup_id: int) -> str | None:
        try:
            path = cgroups.path_of(cgroup_id)
        except OSError:
            return None
        if len(self) >= _CACHED:
            self.clear()
        self[cgroup_id] = found = container_id(path) if path else None
        return found


_ids = _Ids()
