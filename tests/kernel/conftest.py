"""What tests of the kernel's side share: each compiles what it loads, whatever earlier ones have left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.kernel import objects


@pytest.fixture(scope="package", autouse=True)
def compiled_each_time() -> Iterator[None]:
    """No program is taken from the cache, in child processes either; header trees are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBPFSTREAM_CACHE", "")
        yield


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Fails the test that did not wait for its own, not a later one that counts them."""
    before = objects.children()
    yield
    left = objects.children() - before
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert left == set()
