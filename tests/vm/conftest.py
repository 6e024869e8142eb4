"""What lies in inside/ is for the machines that the tests here boot."""

from __future__ import annotations

import os

if "EBPFSTREAM_VM" not in os.environ:
    collect_ignore = ["inside"]
