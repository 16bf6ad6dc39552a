"""Launchers of the CPU kernels in `csrc/cpu/`, one module per op."""
