"""The GPU that a launch is for; see `kimi_ops._target`, which the CUDA C++ launchers share."""

from kimi_ops._target import Target, in_python, is_named, runs_in_python, target, targeting

__all__ = ["Target", "in_python", "is_named", "runs_in_python", "target", "targeting"]
