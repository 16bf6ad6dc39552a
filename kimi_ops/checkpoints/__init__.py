"""The checkpoint that ships with the package, in the released format.

`TINY` is Kimi K2.5's architecture with a few million parameters, trained by `examples/train_tiny`
on the tasks of `kimi_ops.tasks`; `tiny/README.md` says how, and how well it does.
"""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
