"""BCC in its child process: found anywhere, quiet, and clear about what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from ebpfstream.errors import AttachError, BccNotFoundError, CompileError, LoadError
from ebpfstream.kernel import bcc, compiler
from ebpfstream.kernel.bpf import MapType, Program, ProgramType
from ebpfstream.kernel.links import Link, RawTracepoint

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

HELLO = """
BPF_HASH(counts, u32, u64);
BPF_ARRAY(slots, u64, 7);
int hello(void *ctx) { u32 uid = bpf_get_current_uid_gid(); counts.increment(uid); slots.increment(0); return 0; }
int other(void *ctx) { return 0; }
"""


async def test_what_a_module_holds() -> None:
    module = await compiler.compile(HELLO)
    assert set(module.functions) == {"hello", "other"}
    assert {name: (m.type, m.key_size, m.value_size, m.max_entries) for name, m in module.maps.items()} == {
        "counts": (MapType.HASH, 4, 8, 10240),
        "slots": (MapType.ARRAY, 4, 8, 7),
    }
    program = Program.load(
        "hello",
        ProgramType.RAW_TRACEPOINT,
        module.functions["hello"],
        module.numbered,
        license=module.license,
    )
    assert module.maps["slots"].lookup(bytes(4)) == bytes(8)
    link = Link.attach(program, RawTracepoint("sys_enter"))
    os.getppid()
    link.close()
    counted = module.maps["slots"].lookup(bytes(4))
    assert counted is not None
    assert int.from_bytes(counted, "little") > 0
    assert module.maps["counts"].lookup((12345).to_bytes(4, "little")) is None


async def test_flags_reach_the_compiler() -> None:
    module = await compiler.compile("int hello(void *ctx) { return ANSWER; }", ["-DANSWER=0"])
    assert set(module.functions) == {"hello"}


async def test_the_process_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """No output, no other directory, no LLVM."""
    here = Path.cwd()
    await compiler.compile(HELLO)
    with pytest.raises(CompileError):
        await compiler.compile("int hello(void *ctx) { return")
    assert capfd.readouterr() == ("", "")
    assert Path.cwd() == here
    assert "libbcc" not in Path("/proc/self/maps").read_text()
    assert "BCC_KERNEL_SOURCE" not in os.environ


async def test_several_at_once() -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(compiler.compile, f"int f{number}(void *ctx) {{ return {number}; }}")


async def test_errors_of_the_text() -> None:
    text = "int hello(void *ctx) { return nothing + nobody + none + nowhere; }"
    with pytest.raises(CompileError) as caught:
        await compiler.compile(text)
    message = str(caught.value)
    assert message.startswith("BCC refused the program:\n  main.c:1:")
    assert "error: use of undeclared identifier 'nothing'" in message
    assert "nowhere'" not in message
    assert message.endswith("(1 more errors are in the error's `log`)")
    assert caught.value.log.count("error: use of undeclared identifier") == 4
    assert "Unable to find kernel headers" not in message


async def test_what_the_verifier_refuses() -> None:
    module = await compiler.compile("int hello(void *ctx) { return *(int *)(ctx + 100000); }")
    with pytest.raises(
        LoadError, match=r"the kernel refused the program 'hello': .*verifier's last lines"
    ) as caught:
        Program.load(
            "hello", ProgramType.RAW_TRACEPOINT, module.functions["hello"], {}, license=module.license
        )
    assert "R1=ctx()" in str(caught.value)
    assert caught.value.log


async def test_an_unknown_tracepoint() -> None:
    module = await compiler.compile(HELLO)
    program = Program.load(
        "other",
        ProgramType.RAW_TRACEPOINT,
        module.functions["other"],
        module.numbered,
        license=module.license,
    )
    with pytest.raises(
        AttachError, match="other cannot be attached to the raw tracepoint 'nonsense': there is no such"
    ):
        Link.attach(program, RawTracepoint("nonsense"))


async def test_an_impostor_is_recognised_and_worked_around(tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc/__init__.py").write_text("raise RuntimeError('a crystal lattice')")
    with pytest.raises(BccNotFoundError, match=r"bcc is another project's package that has the same name"):
        bcc.find([str(tmp_path)])
    real = bcc.find()
    assert bcc.find([str(tmp_path), str(real.parent)]) == real
    # Nor does one that comes first on the path stand in the way.
    code = (
        f"import sys, anyio; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ebpfstream.kernel import compiler\n"
        "print(list(anyio.run(compiler.compile, 'int hello(void *ctx) { return 0; }').functions))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "['hello']\n"


def test_any_python_will_do(tmp_path: Path) -> None:
    """The child in a virtual environment of each Python that is installed here."""
    names = [f"python3.{minor}" for minor in range(11, 20)]
    pythons = [sys.executable, *filter(None, map(shutil.which, names))]
    pythons += [str(path) for name in names for path in Path.home().glob(f".pyenv/versions/*/bin/{name}")]
    for index, python in enumerate(pythons):
        if subprocess.run([python, "-c", "import venv"], capture_output=True).returncode:
            continue  # a version manager's stand-in for a Python that is not chosen
        venv = tmp_path / str(index)
        subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
        code = (
            f"import sys; sys.path.append({str(Path(__file__).parents[2])!r})\n"
            "from ebpfstream.kernel import bcc\n"
            "bcc._compile_with_headers('int hello(void *ctx) { return 0; }', [])\n"
            "print('compiled')"
        )
        done = subprocess.run([venv / "bin/python", "-I", "-c", code], stdout=subprocess.PIPE, text=True)
        assert done.stdout == "compiled\n", python
