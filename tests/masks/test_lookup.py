from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ways import WAYS, machine_code

from fedmask_flwr.masks import taken


@pytest.fixture(params=WAYS, scope="module", autouse=True)
def way(request):
    with machine_code(request.param == "compiled"):
        yield request.param


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9),
    st.lists(st.integers(0, 12), max_size=40),
    st.sampled_from((np.float64, np.float32, np.int32, np.bool_)),
)
def test_equals_a_python_list(table, numbers, kind):
    entries = np.array(table).astype(kind)
    found = taken(entries, np.array(numbers, np.uint32))
    assert found.dtype == kind
    assert found.tolist() == [entries.tolist()[min(n, len(table) - 1)] for n in numbers]


def test_numbers_that_all_lie_in_one_place():
    assert taken(np.array([0.25]), np.broadcast_to(np.uint32(0), 5)).tolist() == [0.25] * 5
