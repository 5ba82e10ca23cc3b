"""Which of the fragments that additions leave behind are joined, and when."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise


# Fragments of one tier are joined when so many lie side by side that this saves `ENOUGH` of them. An entry is then
# rewritten once a tier, and not whenever something is added.
ENOUGH = 64
TIERS = (ENOUGH, ENOUGH**2, ENOUGH**3, 2**20)
# A reader of an older version goes on with the latest one.
KEPT = timedelta(hours=1)


def tier_to_join(sizes: Sequence[int]) -> int | None:
    """
    The lowest tier of which enough fragments lie side by side.

    Args:
        sizes: Number of entries of each fragment, in their order.

    Returns:
        The number of entries below which fragments are joined, or None if there is nothing to do.
    """
    pairs = Counter(bisect_right(TIERS, max(pair)) for pair in pairwise(sizes))
    return next((tier for place, tier in enumerate(TIERS) if pairs[place] >= ENOUGH), None)
