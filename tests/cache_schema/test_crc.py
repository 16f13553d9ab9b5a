"""crc32c against its published value, and of parts against that of the whole."""

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molkd.cache_schema.crc import crc32c, crc32c_joined, crc_hex


def test_published_value():
    assert crc_hex(crc32c(b"123456789")) == "e3069283"
    assert crc32c(np.frombuffer(b"6789", np.uint8), crc32c(b"12345")) == 0xE3069283


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_whole_follows_from_its_parts(first, second):
    joined = crc32c_joined(crc32c(first), crc32c(second), len(second))
    assert joined == google_crc32c.value(first + second)


@pytest.mark.parametrize("n", [1, 1024, 1 << 20, (1 << 20) + 1])
def test_long_parts(n):
    data = np.random.default_rng(n).bytes(2 * n)
    assert crc32c_joined(crc32c(data[:n]), crc32c(data[n:]), n) == google_crc32c.value(data)
