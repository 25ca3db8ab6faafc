"""The table of differences at kinks can be printed, and they agree with the exact product where they cross none."""

import pytest
import torch

from .kinks import compare, report


@pytest.fixture
def _in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_report():
    text = report(0, (0.01,), (1,))
    rows = [line for line in text.splitlines() if line.startswith("| 0.01 ")]
    assert len(rows) == 1
    assert rows[0].count(" to ") == 8


@pytest.mark.usefixtures("_in_double")
def test_a_radius_that_crosses_no_kink():
    found = compare("darts", 0, (1e-7, 0.1), (1,))
    for one_sided in (False, True):
        assert min(own.cosine for own in found[1e-7, one_sided]) > 1 - 1e-6
        assert max(own.error for own in found[1e-7, one_sided]) < 1e-3
        assert max(own.error for own in found[0.1, one_sided]) > 1e-2
