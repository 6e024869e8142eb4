"""An emulated machine whose first process is systemd, over this machine's files: what a unit can be run in.

virtme-ng has an init of its own, and systemd only as a trial; so this boots without it: 9p and overlayfs, and Debian's
units up to basic.target.  What is written in there is gone afterwards.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.vm import machine
from tests.vm.machine import ROOT, Outcome

_SYSTEMD: Final = "/lib/systemd/systemd"
_MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
# What takes long and nothing here needs: the first of them empties /tmp.
_MASKED: Final = (
    "systemd-tmpfiles-setup.service",
    "systemd-udevd.service",
    "systemd-timesyncd.service",
    "timers.target",
)
# Where things are in there: outside of /home and /root, which a unit may be forbidden to see.
PYTHON: Final = "/opt/ebpfstream/bin/python"
CHECKOUT: Final = "/opt/checkout"

_DONE: Final = "exit code: "

# The device is a whiteout of overlayfs: what is cached outside changes meanwhile, and is not to be seen in there.
_INIT: Final = """\
#!/bin/busybox sh
b=/bin/busybox
$b mkdir /proc /dev /host /over /root
$b mount -t proc proc /proc
for module in {modules}; do $b insmod /$module; done
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /host
$b mount -t tmpfs over /over
$b mkdir -p /over/upper/var/cache /over/work
$b mknod /over/upper/var/cache/ebpfstream c 0 0
$b mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /root
$b sh /root{folder}/prepare.sh
exec $b switch_root /root {systemd}
"""

# A virtual environment of its own, since it may be a home that has Python and this project; entered as the real one
# is, by its script.  Of this machine: what tells systemd that it is in a container, and what is to be mounted.
_PREPARE: Final = """\
b=/bin/busybox
$b rm -f /root/.dockerenv /root/etc/fstab
$b mkdir -p /root/opt/python /root{checkout} /root/opt/ebpfstream/bin /root/opt/ebpfstream/lib/{version}/site-packages
$b mount --bind /host{base} /root/opt/python
$b mount --bind /host{site_packages} /root/opt/ebpfstream/lib/{version}/site-packages
$b mount --bind /host{root} /root{checkout}
$b ln -s /opt/python/bin/{version} /root{python}
echo 'home = /opt/python/bin' >/root/opt/ebpfstream/pyvenv.cfg
$b cat >/root/opt/ebpfstream/bin/ebpfstream <<'.'
#!{python}
import sys
sys.path.insert(0, "{checkout}")
from ebpfstream.cli import main
main()
.
$b chmod 755 /root/opt/ebpfstream/bin/ebpfstream
$b mkdir -p /root/etc/systemd/system
$b cat >/root/etc/systemd/system/trial.service <<'.'
[Unit]
Requires=basic.target
After=basic.target
[Service]
Type=oneshot
ExecStart=/bin/sh /opt/trial.sh
Environment=PYTHONDONTWRITEBYTECODE=1
TimeoutStartSec=infinity
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
.
$b cat >/root/opt/trial.sh <<'.'
cd {checkout}
{command} >/dev/ttyS1
echo "{done}$?" >/dev/ttyS1
systemctl poweroff -ff
.
$b cat >/root/etc/systemd/system/trial.target <<'.'
[Unit]
Wants=trial.service
.
"""


def missing() -> str:
    """What has to be installed before such a machine can be booted, and how; "" if nothing has."""
    if lacking := machine.missing():
        return lacking
    if not os.access(_SYSTEMD, os.X_OK):
        return f"there is no {_SYSTEMD}: apt-get install systemd"
    return ""


def run(command: list[str], folder: Path, *, limit: float) -> Outcome:
    """Boot, run a command as root in the checkout, and power off; all within `limit` seconds.

    It is run once basic.target is reached.  `folder` is as for `machine.run`; its path in the machine is the same.
    """
    kernel = machine._kernel()
    assert kernel, missing()
    folder.mkdir(parents=True, exist_ok=True)
    output, console = folder / "output.txt", folder / "console.txt"
    (folder / "prepare.sh").write_text(_prepare(command))
    (folder / "initrd").write_bytes(_initrd(kernel.name.removeprefix("vmlinuz-"), folder))
    boot = [
        "timeout",
        "--signal=KILL",
        str(limit),
        machine._QEMU,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]
    boot += ["-display", "none", "-M", "q35", "-accel", "tcg,thread=multi", "-smp", "2", "-m", "1G"]
    boot += ["-kernel", str(kernel), "-initrd", str(folder / "initrd")]
    masked = " ".join(f"systemd.mask={unit}" for unit in _MASKED)
    boot += ["-append", f"console=ttyS0 mitigations=off panic=-1 systemd.unit=trial.target {masked}"]
    boot += ["-serial", f"file:{console}", "-serial", f"file:{output}", "-device", "virtio-rng-pci"]
    boot += shlex.split(machine._QEMU_OPTIONS)
    process = subprocess.Popen(boot, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text(errors="replace") if output.exists() else ""
    ended = re.search(rf"^{_DONE}(\d+)$", text, re.MULTILINE)
    return Outcome(int(ended[1]) if ended else code or 255, text, console)


def _prepare(command: list[str]) -> str:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return _PREPARE.format(
        base=sys.base_prefix,
        site_packages=Path(sys.prefix, "lib", version, "site-packages"),
        root=ROOT,
        version=version,
        python=PYTHON,
        checkout=CHECKOUT,
        command=shlex.join(command),
        done=_DONE,
    )


def _initrd(release: str, folder: Path) -> bytes:
    """What the kernel starts from: busybox, modules, and the script that brings it to systemd."""
    busybox = shutil.which("busybox")
    assert busybox
    paths: dict[str, Path] = {}
    for module in _MODULES:
        command = ["/sbin/modprobe", "--set-version", release, "--show-depends", module]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            if line.startswith("insmod "):  # "builtin" needs nothing
                path = Path(line.split()[1])
                paths[path.name] = path
    init = _INIT.format(modules=" ".join(paths), folder=folder, systemd=_SYSTEMD)
    files = [
        ("bin", 0o40755, b""),
        ("bin/busybox", 0o100755, Path(busybox).read_bytes()),
        ("init", 0o100755, init.encode()),
        *((name, 0o100644, path.read_bytes()) for name, path in paths.items()),
        ("TRAILER!!!", 0, b""),
    ]
    return b"".join(_entry(number, *file) for number, file in enumerate(files, 1))


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    """A file in an archive, Documentation/driver-api/early-userspace/buffer-format.rst."""
    # Magic; inode, mode, uid, gid, links, mtime, size; four of devices; the name's length, a check that is not used.
    numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % each for each in numbers) + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
