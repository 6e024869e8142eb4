"""Cgroup paths as container runtimes make them."""

from __future__ import annotations

import os

import pytest

from ebpfstream import containers
from ebpfstream.containers import container_id
from ebpfstream.kernel import cgroups

A = "34dc0b5e626f2c5c4c5170e34b10e7654ce36f0fcd532739f4445baabea03376"
B = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970"
POD = "pod74c13223-5a00-11e9-b385-42010a80018d"
POD_SLICE = POD.replace("-", "_")
ROOTLESS = "/user.slice/user-1000.slice/user@1000.service"
KUBE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-{POD_SLICE}.slice"

PATHS: dict[str, str | None] = {
    # Docker
    f"/docker/{A}": A,
    f"/docker/{A}/": A,
    f"/system.slice/docker-{A}.scope": A,
    f"/system.slice/docker-{A}.scope/init": A,
    f"/system.slice/docker-{A}.scope/system.slice/cron.service": A,
    f"{ROOTLESS}/user.slice/docker-{A}.scope": A,
    f"/custom-parent.slice/docker-{A}.scope": A,
    f"/{A}": A,
    f"/docker-ce/docker/{A}": A,
    # in Docker: the innermost
    f"/docker/{A}/docker/{B}": B,
    f"/docker/{B}/docker/{A}/init.scope": A,
    f"/system.slice/docker-{A}.scope/docker/{B}": B,
    f"/docker/{A}/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{B}.scope": B,
    f"/docker/{A}/kubelet.slice/kubelet.service": A,
    f"/docker/{A}/system.slice/containerd.service": A,
    f"/docker/{A}/default/redis": "redis",
    f"/docker/{A}/libpod_parent/libpod-conmon-{B}": A,
    # containerd
    f"/default/{A}": A,
    "/default/redis": "redis",
    "/default/redis/inner": "redis",
    "/k8s.io/some-id": "some-id",
    f"/moby/{A}": A,
    f"/system.slice/nerdctl-{A}.scope": A,
    f"{KUBE}/cri-containerd-{A}.scope": A,
    f"{KUBE}/docker-{A}.scope": A,
    f"/kubepods/besteffort/{POD}/{A}": A,
    f"/kubepods/burstable/{POD}/{A}/sub/group": A,
    f"/kubepods/{POD}/{A}": A,
    f"/kubepods-burstable-{POD_SLICE}.slice:cri-containerd:{A}": A,
    f"/system.slice/containerd.service/kubepods-burstable-{POD_SLICE}.slice:cri-containerd:{A}": A,
    f"/system.slice/containerd.service/kubepods-besteffort-{POD_SLICE}.slice:cri-containerd:{A}/x": A,
    # CRI-O
    f"{KUBE}/crio-{A}.scope": A,
    f"{KUBE}/crio-{A}.scope/container": A,
    f"/kubepods/burstable/{POD}/crio-{A}": A,
    f"{KUBE}/crio-conmon-{A}.scope": None,
    f"/kubepods/burstable/{POD}/crio-conmon-{A}": None,
    # Podman
    f"/machine.slice/libpod-{A}.scope": A,
    f"/machine.slice/libpod-{A}.scope/container": A,
    f"/machine.slice/libpod-conmon-{A}.scope": None,
    f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope": A,
    f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-conmon-{A}.scope": None,
    f"{ROOTLESS}/user.slice/libpod-{A}.scope/container": A,
    f"{ROOTLESS}/user.slice/libpod-conmon-{A}.scope": None,
    f"{ROOTLESS}/app.slice/redis.service/libpod-payload-{A}": A,
    f"{ROOTLESS}/app.slice/redis.service/runtime": None,
    f"/libpod_parent/libpod-{A}": A,
    f"/libpod_parent/libpod-{A}/ctr": A,
    f"/libpod_parent/libpod-conmon-{A}": None,
    "/libpod_parent/conmon": None,
    f"/libpod_parent/{B}/libpod-{A}": A,
    f"/libpod_parent/{B}/conmon": None,
    f"/system.slice/{A}-1f2e3d4c5b6a7988.service": None,  # a health check, outside of the container
    f"/system.slice/{A}.service": None,
    # systemd-nspawn, libvirt
    "/machine.slice/machine-box.scope": "box",
    r"/machine.slice/machine-my\x2dbox.scope": "my-box",
    r"/machine.slice/machine-my\x2dbox.scope/payload/init.scope": "my-box",
    r"/machine.slice/machine-my\x2dbox.scope/supervisor": None,
    "/machine.slice/systemd-nspawn@box.service": "box",
    "/machine.slice/systemd-nspawn@my-box.service/payload/system.slice/cron.service": "my-box",
    r"/machine.slice/systemd-nspawn@my\x2dbox.service/payload": "my-box",
    "/machine.slice/systemd-nspawn@box.service/supervisor": None,
    f"/machine.slice/systemd-nspawn@box.service/payload/system.slice/docker-{A}.scope": A,
    r"/machine.slice/machine-lxc\x2d4242\x2dweb.scope": "lxc-4242-web",
    r"/machine.slice/machine-qemu\x2d6\x2dvm1.scope/libvirt/emulator": None,
    r"/machine.slice/machine-qemu\x2d6\x2dubuntu20.04.scope": None,
    r"/machine.slice/machine-qemu\x2dbuilder.scope": "qemu-builder",
    r"/machine.slice/machine-caf\xc3\xa9.scope": "café",
    r"/machine.slice/machine-\xff.scope": r"\xff",
    # LXC, LXD, Incus, Proxmox
    "/lxc.payload.focal": "focal",
    "/lxc.payload.focal/system.slice/avahi-daemon.service": "focal",
    "/lxc.payload.snapcraft_some-container": "snapcraft_some-container",
    "/lxc.payload.with.dots": "with.dots",
    "/user.slice/user-1000.slice/session-1.scope/lxc.payload.web/init.scope": "web",
    "/lxc.payload/web": "web",
    "/lxc/web": "web",
    "/lxc/101/ns/init.scope": "101",
    "/lxc/lxc/init.scope": "lxc",
    "/lxc.payload/lxc/init.scope": "lxc",
    "/lxc/101/ns/lxc/inner": "inner",
    "/lxc.payload.outer/lxc.payload.inner": "inner",
    f"/lxc.payload.outer/docker/{A}": A,
    f"/lxc.payload.{A}": A,
    "/lxc.payload." + os.fsdecode(b"caf\xe9"): r"caf\xe9",
    "/lxc.monitor.web": None,
    "/lxc.monitor/web": None,
    "/lxc.pivot": None,
    # ECS
    f"/ecs/55091c13-b8cf-4801-b527-f4601742204d/{A}": A,
    f"/ecs/my-cluster/766a1ed5c6c0405789c2ef2f8f5f9ebb/{A}": A,
    f"/ecstasks.slice/ecstasks-766a1ed5c6c0405789c2ef2f8f5f9ebb.slice/docker-{A}.scope": A,
    # none
    "/": None,
    "": None,
    "/init.scope": None,
    "/docker": None,
    "/default": None,
    "/lxc": None,
    "/machine.slice": None,
    "/machine.slice/machine-.scope": None,
    "/user.slice/user-1000.slice/session-3.scope": None,
    f"{ROOTLESS}/init.scope": None,
    f"{ROOTLESS}/app.slice/app-gnome-firefox-4711.scope": None,
    f"{ROOTLESS}/app.slice/app-org.x.default.slice/default/worker": None,
    "/system.slice/docker.service": None,
    "/system.slice/containerd.service": None,
    "/system.slice/crio.service": None,
    "/system.slice/lxc.service": None,
    "/system.slice/cron.service": None,
    "/system.slice/default/worker": None,
    "/system.slice/run-r766a1ed5c6c0405789c2ef2f8f5f9ebb.scope": None,
    "/system.slice/system-getty.slice/getty@tty1.service": None,
    "/machine.slice/systemd-vmspawn@vm.service": None,
    KUBE: None,
    f"/kubepods/besteffort/{POD}": None,
    f"/docker/{A[:-1]}": None,
    f"/docker/{A}0": None,
    f"/docker/{A.upper()}": None,
    f"/docker/x{A}": None,
}


@pytest.mark.parametrize("path", PATHS)
def test_the_container_of_a_path(path: str) -> None:
    assert container_id(path) == PATHS[path]


def test_ids_are_remembered_and_their_number_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def path_of(cgroup_id: int) -> str | None:
        asked.append(cgroup_id)
        return None if cgroup_id % 2 else f"/lxc/{cgroup_id}"

    monkeypatch.setattr(cgroups, "path_of", path_of)
    monkeypatch.setattr(containers, "_ids", containers._Ids())
    monkeypatch.setattr(containers, "_CACHED", 10)
    for _ in range(3):
        assert [containers.of_cgroup(number) for number in (4, 5)] == ["4", None]
    assert asked == [4, 5]
    for number in range(100):
        assert containers.of_cgroup(number) == (None if number % 2 else str(number))
        assert len(containers._ids) <= 10


def test_an_answer_for_want_of_descriptors_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(cgroup_id: int) -> str | None:
        raise OSError("Too many open files")

    monkeypatch.setattr(containers, "_ids", containers._Ids())
    with monkeypatch.context() as patched:
        patched.setattr(cgroups, "path_of", fails)
        assert containers.of_cgroup(7) is None
    monkeypatch.setattr(cgroups, "path_of", lambda cgroup_id: "/lxc/web")
    assert containers.of_cgroup(7) == "web"
