"""python -m ebpfstream."""

from ebpfstream.cli import main

main(prog_name="ebpfstream")
