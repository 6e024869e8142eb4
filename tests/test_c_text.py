"""What a program's text shows: what is submitted, and what its functions take."""

from __future__ import annotations

import pytest

from ebpfstream.kernel.c_text import first_parameter, submissions

PROGRAM = """
// output.perf_submit(ctx, &commented, sizeof(commented));
const char *text = "output.perf_submit(ctx, &quoted, 1)";
struct a_t { int x; };
static inline void helper(void *ctx, struct a_t *given) { %s }
int f(struct pt_regs *ctx, int a) {
    %s
    return 0;
}
"""


@pytest.mark.parametrize(
    ("code", "declared", "length"),
    [
        ("struct a_t d = {}; output.perf_submit(ctx, &d, sizeof(d));", "struct a_t", None),
        ("a_t d; return output . perf_submit ( ctx , & d , sizeof(d) );", "a_t", None),
        (
            "struct a_t *d = map.lookup(&k); if (d) output.perf_submit(ctx, d, sizeof(*d));",
            "struct a_t",
            None,
        ),
        ("struct a_t* d; output.ringbuf_output(d, sizeof(*d), 0);", "struct a_t", None),
        ("struct a_t *d = output.ringbuf_reserve(8); output.ringbuf_submit(d, 0);", "struct a_t", None),
        ("struct a_t c, d; output.ringbuf_output(&d, sizeof(d), 0);", "struct a_t", None),
        ("struct a_t c, *d; output.ringbuf_output(d, sizeof(*d), 0);", "struct a_t", None),
        ("unsigned long long d = 1; output.ringbuf_output(&d, 8, 0);", "unsigned long long", None),
        ("u64 d; output.ringbuf_output((void *)&d, 8, 0);", "u64", None),
        ("u64 d; output.ringbuf_output((&d), 8, 0);", "u64", None),
        ("char d[64]; output.perf_submit(ctx, d, 64);", "char", "64"),
        ("char d[64]; output.perf_submit(ctx, &d, 64);", "char", "64"),
        ("const struct a_t d = {}; output.perf_submit(ctx, &d, 4);", "struct a_t", None),
        ("{ u32 d; } struct a_t d; output.perf_submit(ctx, &d, 4);", "struct a_t", None),
        ("struct a_t d; output.perf_submit_skb(ctx, 0, &d, 4);", "struct a_t", None),
        (
            "struct d *d = output.ringbuf_reserve(sizeof(struct d)); if (!d) return 0; output.ringbuf_submit(d, 0);",
            "struct d",
            None,
        ),
        ("u64 c, d = 1; c = c * d; f(c * d, (u64)c * d); output.perf_submit(ctx, &d, 8);", "u64", None),
        ("for (struct a_t *d = 0; d; d++) output.perf_submit(ctx, d, 4);", "struct a_t", None),
        ("switch (a) { case 1: struct a_t d; output.perf_submit(ctx, &d, 4); }", "struct a_t", None),
        ("struct a_t *d; output.perf_submit(ctx, &d, 8);", None, None),
        ("u64 d; output.perf_submit(ctx, d, 8);", None, None),
        ("output.perf_submit(ctx, &d->x, 8);", None, None),
        ("output.perf_submit(ctx, unheard_of, 8);", None, None),
        ("d = 1; output.perf_submit(ctx, &d, 8);", None, None),
    ],
)
def test_what_is_submitted(code: str, declared: str | None, length: str | None) -> None:
    (found,) = submissions(PROGRAM % ("", code))
    assert (found.output, found.type, found.length) == ("output", declared, length)
    assert found.line == 7


def test_directives_between_declarations() -> None:
    text = PROGRAM % (
        "",
        "int a;\n#define TWO \\\n  2\n#ifdef X\nstruct a_t d;\n#endif\no.perf_submit(ctx, &d, 4);",
    )
    assert [found.type for found in submissions(text)] == ["struct a_t"]


def test_a_parameter_and_another_function_of_the_same_names() -> None:
    first, second = submissions(
        PROGRAM
        % (
            "output.perf_submit(ctx, given, sizeof(*given));",
            "u32 given; output.perf_submit(ctx, &given, 4);",
        )
    )
    assert (first.type, first.line) == ("struct a_t", 5)
    assert (second.type, second.line) == ("u32", 7)


def test_what_cannot_be_parsed_is_no_submission() -> None:
    assert submissions("output.perf_submit(") == []
    assert submissions("o.perf_submit(a)} o.ringbuf_output(") == []


def test_first_parameter() -> None:
    text = """
    int first(void *ctx) { return 0; }
    int second(struct pt_regs  *ctx, const char *name) { return first(ctx); }
    /* int third(void *ctx) { */
    TRACEPOINT_PROBE(syscalls, sys_enter_execve) { return 0; }
    """
    assert first_parameter(text, "first") == "void *ctx"
    assert first_parameter(text, "second") == "struct pt_regs *ctx"
    assert first_parameter(text, "third") is None
