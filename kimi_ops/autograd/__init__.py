"""The gradients of the ops, in plain PyTorch, written to be read: one module per op.

Each states its formula and follows the protocol of `kimi_ops._autograd`. Sums and statistics are in
float32, or in float64 for float64 arguments; a gradient has the dtype of its argument. They run on
any device and are as deterministic as the ops: equal calls give equal bits.
"""
