"""What tests of the kernel's side share: each compiles what it loads, whatever earlier ones have left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def compiled_each_time() -> Iterator[None]:
    """No program is taken from the cache, in child processes either; header trees are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBPFSTREAM_CACHE", "")
        yield
