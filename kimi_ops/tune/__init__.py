"""`kimi-ops tune`: searches the tiles of the Triton kernels for one GPU, offline.

`cases`: Kimi K2.5's calls; `trials`: whether a candidate may be used at all; `clocks`: how long it
takes, measured on a GPU or modelled; `search`: all of it, and the file that `KIMI_OPS_TILES` reads.
"""
