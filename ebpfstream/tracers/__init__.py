"""Ready-made streams, a file each, beside their programs in bpf/."""
