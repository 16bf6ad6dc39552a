"""The microbenchmark suite: every op on this machine, against its limits and its peers.

`case` says what is measured: cases live in `bench/bench_<op>.py`, which is `kimi_ops.bench.cases`
when installed. `measure` checks a case and times it, `record` keeps what was found, `page` and
`table` show it, `modelled` and `step` need no GPU to speak of one; `command` is the command line.
"""

from __future__ import annotations

from kimi_ops.bench.case import Args, BenchCase, Maker, Work

__all__ = ["Args", "BenchCase", "Maker", "Work"]
