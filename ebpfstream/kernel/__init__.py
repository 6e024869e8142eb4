"""The only folder that talks to the kernel."""
