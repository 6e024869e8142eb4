"""The long-running service: what `ebpfstream run` does with a configuration."""
