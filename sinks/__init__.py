"""Where events go: a file each, which imports the contract, and else what SINKS_SEE in tests/test_house.py names."""
