"""Arbitrary bytes for everything that reads what the kernel wrote.

`make fuzz` runs all targets, `python -m fuzz NAME…` some; tests/test_fuzz.py is a short run.
"""
