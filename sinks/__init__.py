"""Where events go: a file each, which imports the contract and public names alone."""
