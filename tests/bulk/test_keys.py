"""Keys in sorted arrays are found as in a set and in a dict."""

import numpy as np
import pytest

from hf_unigd.bulk.keys import KeyPlaces, KeySet


@pytest.fixture(params=range(4))
def draw(request):
    """Draws keys of which many are equal, and some are the largest and smallest."""
    generator = np.random.default_rng(request.param)
    known = np.concatenate([generator.integers(0, 2**63 - 1, 300), [0, 2**63 - 1]])
    return lambda count: generator.choice(known, count)


def test_new_keys_are_those_that_a_set_lacks(draw):
    first = draw(20)
    keys, expected = KeySet(first), set(first.tolist())
    for count in (0, 1, 3, 50, 2, 0, 100, 1, 1, 200):
        added = draw(count)
        is_new = []
        for key in added.tolist():
            is_new.append(key not in expected)
            expected.add(key)
        assert keys.add(added).tolist() == is_new
        assert len(keys) == len(expected)


def test_a_set_of_many_portions_holds_few_arrays():
    keys = KeySet(np.zeros(0, np.int64))
    for start in range(0, 5000, 5):
        assert keys.add(np.arange(start, start + 5)).all()
    assert len(keys) == 5000 and len(keys._arrays) <= 12
    assert not keys.add(np.arange(5000)).any()


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_places_are_those_of_a_dict(draw, count):
    keys = draw(count)
    places, expected, is_first = KeyPlaces(keys), {}, []
    for key in keys.tolist():
        is_first.append(key not in expected)
        expected.setdefault(key, len(expected))
    assert len(places) == len(expected) and places.is_first.tolist() == is_first
    asked = draw(500)[:count]
    known = asked[[key in expected for key in asked.tolist()]] if count else asked
    assert places.find(known).tolist() == [expected[key] for key in known.tolist()]
    with pytest.raises(KeyError):
        places.find(np.array([*known, 5]))
