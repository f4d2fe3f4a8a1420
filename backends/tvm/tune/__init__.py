"""Tuning: finding, by measuring, better choices for kernels than the rules make.

Imports nothing by itself, so that the process that runs candidates is there at once.
"""
