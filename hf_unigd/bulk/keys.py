"""Hashes of contents in sorted arrays, found by binary search: 8 bytes each, where a dict takes more than 100."""

import numpy as np


class KeySet:
    """
    A set of keys that grows. It holds few sorted arrays, each more than twice as long as the next, so that adding `n`
    keys in any portions moves each of them `log(n)` times.

    Args:
        keys (`np.ndarray` of shape `(n,)`, int64): The first keys, in any order.
    """

    def __init__(self, keys: np.ndarray):
        self._arrays = [np.unique(keys)]

    def __len__(self) -> int:
        return sum(map(len, self._arrays))

    def add(self, keys: np.ndarray) -> np.ndarray:
        """
        Adds keys, and returns which of them are new, each where it comes first.

        Args:
            keys (`np.ndarray` of shape `(n,)`, int64): The keys.

        Returns:
            `np.ndarray` of shape `(n,)`, bool.
        """
        distinct, first = np.unique(keys, return_index=True)
        is_known = np.zeros(len(distinct), bool)
        for array in self._arrays:
            is_known |= _find(array, distinct)[1]
        self._append(distinct[~is_known])
        is_new = np.zeros(len(keys), bool)
        is_new[first[~is_known]] = True
        return is_new

    def _append(self, keys: np.ndarray) -> None:
        if not len(keys):
            return
        while self._arrays and len(self._arrays[-1]) <= 2 * len(keys):
            keys = np.sort(np.concatenate([self._arrays.pop(), keys]), kind="stable")  # which merges what is sorted
        self._arrays.append(keys)


class KeyPlaces:
    """
    Numbers distinct keys in the order in which they come first.

    Args:
        keys (`np.ndarray` of shape `(n,)`, int64): The keys, some of which may be equal.

    Attributes:
        is_first (`np.ndarray` of shape `(n,)`, bool): Whether each of `keys` is the first of its value.
    """

    def __init__(self, keys: np.ndarray):
        self._keys, first = np.unique(keys, return_index=True)
        self.is_first = np.zeros(len(keys), bool)
        self.is_first[first] = True
        self._places = np.cumsum(self.is_first)[first] - 1

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """
        The numbers of keys.

        Args:
            keys (`np.ndarray` of shape `(n,)`, int64): Keys, in any order.

        Returns:
            `np.ndarray` of shape `(n,)`, int64.

        Raises:
            KeyError: a key is not among them.
        """
        places, is_found = _find(self._keys, keys)
        if not is_found.all():
            raise KeyError(int(keys[~is_found][0]))
        return self._places[places]


def _find(array: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of keys in a sorted array, and whether they are there."""
    if not len(array):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    places = np.searchsorted(array, keys).clip(max=len(array) - 1)
    return places, array[places] == keys
