"""Small tasks with known answers: what the shipped model learns, and what `kimi-ops eval` asks.

Pictures are drawn, or come from scikit-learn (handwritten digits) and scikit-image (photographs);
nothing is downloaded. A sample depends on its task, split, number and seed alone.
"""

from kimi_ops.tasks.registry import TASKS, make_sample
from kimi_ops.tasks.sample import SPLITS, Sample, Split, is_correct

__all__ = ["SPLITS", "TASKS", "Sample", "Split", "is_correct", "make_sample"]
