"""Measurements for users, of their own machine."""
