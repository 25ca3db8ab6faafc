"""The students are torchvision's networks."""

import pytest
import torch

from problems.students import StudentResNet


def test_students_are_torchvisions_at_full_width():
    assert sum(p.numel() for p in StudentResNet(18, 1000, small_images=False).parameters()) == 11_689_512
    assert sum(p.numel() for p in StudentResNet(50, 1000, small_images=False).parameters()) == 25_557_032
    small = StudentResNet(50, 10, 1, width=4)
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="expected depth 18 or 50"):
        StudentResNet(34, 10)
