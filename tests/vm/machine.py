"""A machine with Debian's kernel, emulated, over this machine's files: what tests need that want kprobes.

Everything in it is slower than outside, some twenty times.  What it writes is gone afterwards.
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
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
_BIN: Final = Path(sys.executable).parent
_QEMU: Final = "qemu-system-x86_64"
_OPTIONS: Final = ("CONFIG_KPROBE_EVENTS", "CONFIG_DEBUG_INFO_BTF", "CONFIG_9P_FS")

# virtme-ng mounts this machine's files without a cache, so that each start of Python reads all of it again.
# They are mounted once more, over the folders that matter.
_SCRIPT: Final = """\
set -e
mkdir /run/host
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /run/host
for folder in {folders}; do
    mount --bind "/run/host$folder" "$folder"
done
export EBPFSTREAM_VM=1 PYTHONDONTWRITEBYTECODE=1 PATH={path}:"$PATH"
cd {root}
exec {command}
"""

_QEMU_OPTIONS: Final = (
    # More features cost more: glibc would use vector instructions that are slow to emulate, and the kernel
    # would load KVM.
    "-cpu Nehalem "
    "-fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap "
    "-device virtio-9p-pci,fsdev=host,mount_tag=host"
)


class Outcome(NamedTuple):
    """What became of a command.

    `code` is its exit code; 255 if the machine ended before it, -9 if both were killed since time was up.
    `output` is what it wrote to its standard output; the kernel's messages and the standard error are in
    the file `console`.
    """

    code: int
    output: str
    console: Path


def missing() -> str:
    """What has to be installed before a machine can be booted, and how; "" if nothing has."""
    if os.uname().machine != "x86_64":
        return "only x86-64 machines are emulated"
    found = {
        _QEMU: shutil.which(_QEMU),
        "a static busybox": (busybox := shutil.which("busybox")) and not _is_dynamic(busybox),
        "virtme-ng": (_BIN / "vng").exists(),
        f"a kernel in /boot with {', '.join(_OPTIONS)}": _kernel(),
    }
    lacking = [name for name, there in found.items() if not there]
    if not lacking:
        return ""
    return (
        f"no machine can be emulated here without {', '.join(lacking)}: as root, `make test` installs them on "
        "Debian (apt-get install qemu-system-x86 busybox-static linux-image-amd64; pip install virtme-ng)"
    )


def run(command: list[str], folder: Path, *, limit: float, arguments: str = "", cpus: int = 2) -> Outcome:
    """Boot, run a command as root in this project's folder, and power off; all within `limit` seconds.

    `arguments` are for the kernel (Documentation/admin-guide/kernel-parameters.txt).  In `folder` is left
    what was run, written and logged.  Whatever happens, nothing runs any more afterwards.
    """
    kernel = _kernel()
    assert kernel, missing()
    folder.mkdir(parents=True, exist_ok=True)
    script, output, console = (folder / name for name in ("script.sh", "output.txt", "console.txt"))
    folders = dict.fromkeys(["/usr", sys.base_prefix, sys.prefix, str(ROOT)])
    script.write_text(
        _SCRIPT.format(
            folders=shlex.join(folders),
            path=shlex.quote(str(_BIN)),
            root=shlex.quote(str(ROOT)),
            command=shlex.join(command),
        )
    )
    # timeout(1) ends its whole process group, and does so even when this process is gone.
    boot = ["timeout", "--signal=KILL", str(limit), "vng", f"--run={kernel}", "--disable-kvm", "--force-9p"]
    boot += ["--verbose", "--user=root", f"--cpus={cpus}", "--memory=1G", f"--qemu-opts={_QEMU_OPTIONS}"]
    boot += [f"--append=mitigations=off {arguments}", f"--exec=sh {shlex.quote(str(script))}"]
    with output.open("w") as out, console.open("w") as err:
        process = subprocess.Popen(
            boot,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | {"PATH": f"{_BIN}:{os.environ['PATH']}", "TMPDIR": str(folder)},
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return Outcome(code, output.read_text(errors="replace"), console)


def _is_dynamic(program: str) -> bool:
    return subprocess.run(["ldd", program], capture_output=True).returncode == 0


@cache
def _kernel() -> Path | None:
    """The newest kernel that will do, rather another one than what is running: that is one more version tested."""

    def rank(image: Path) -> tuple[bool, list[int]]:
        return not image.name.endswith(os.uname().release), [int(n) for n in re.findall(r"\d+", image.name)]

    return max(filter(_will_do, Path("/boot").glob("vmlinuz-*")), key=rank, default=None)


def _will_do(image: Path) -> bool:
    release = image.name.removeprefix("vmlinuz-")
    config = image.with_name(f"config-{release}")
    if not (os.access(image, os.R_OK) and Path("/lib/modules", release).is_dir() and config.exists()):
        return False
    text = config.read_text()
    return all(re.search(rf"^{option}=[ym]$", text, re.MULTILINE) for option in _OPTIONS)
