"""Cutout is DeVries and Taylor's: a square of zeros around a uniform centre, clipped at the border."""

import pytest
import torch

import mlo
from problems.data import Cutout


def hole(image):
    rows, columns = (image[0] == 0).nonzero(as_tuple=True)
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def test_the_hole_is_a_clipped_square_with_a_uniform_centre():
    cutout, image = Cutout(4), torch.ones(3, 8, 6)
    expected = {
        (max(y - 2, 0), min(y + 2, 8), max(x - 2, 0), min(x + 2, 6)) for y in range(8) for x in range(6)
    }  # of the published code
    torch.manual_seed(0)
    counts = {}
    for _ in range(3000):
        cut = cutout(image)
        top, bottom, left, right = hole(cut)
        assert float(cut.sum()) == 3 * (48 - (bottom - top) * (right - left))
        counts[top, bottom, left, right] = counts.get((top, bottom, left, right), 0) + 1
    assert set(counts) == expected
    # Each of the 48 centres has a hole of its own, so 1/48 of the draws.
    assert len(expected) == 48
    assert min(counts.values()) > 30
    assert max(counts.values()) < 100
    assert float(image.sum()) == 144  # the image itself is not changed


def test_odd_and_large_holes():
    torch.manual_seed(0)
    holes = [hole(Cutout(3)(torch.ones(1, 9, 9))) for _ in range(50)]
    assert {bottom - top for top, bottom, _, _ in holes} == {2, 3}
    assert {right - left for _, _, left, right in holes} == {2, 3}
    assert float(Cutout(1)(torch.ones(1, 4, 4)).sum()) == 15
    assert float(Cutout(99)(torch.ones(1, 4, 4)).sum()) == 0


@pytest.mark.parametrize("pixels", [0, -2])
def test_a_side_that_is_not_positive_is_refused(pixels):
    with pytest.raises(mlo.MloError, match="cutout: expected a side of at least 1 pixel"):
        Cutout(pixels)
