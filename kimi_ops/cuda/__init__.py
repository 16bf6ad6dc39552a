"""Launchers of the CUDA C++ kernels in `csrc/cuda/`, one module per op."""
