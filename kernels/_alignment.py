"""What a kernel may believe about strides beyond what Triton finds out itself.

Triton's launcher tells the compiler about strides that are multiples of 16 elements. A head of 72
has a stride of 72: a multiple of 8, which is 16 bytes, but to the compiler any number, and loads of
two bytes would follow.
"""

from __future__ import annotations


def common_alignment(*strides: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides every stride, in elements.

    For ``tl.multiple_of`` on offsets that are products with these strides.
    """
    return next(size for size in (8, 4, 2, 1) if all(stride % size == 0 for stride in strides))
