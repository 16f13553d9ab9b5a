"""What tests of remote stores read, and what it is compared with."""

import numpy as np
from cache_example import SIGNALS, TEACHER

from molkd.cache_schema.reader import FIELDS, Cache

NAMES = tuple(spec.name for spec, _ in SIGNALS)
NODE = f"teachers/{TEACHER}/node/values"  # an array


def read_all(store) -> dict[str, np.ndarray]:
    with Cache.open(store) as cache:
        return cache.read(np.arange(cache.n_systems), FIELDS, TEACHER, NAMES)


def assert_same(store, local) -> None:
    found, expected = read_all(store), read_all(local)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
