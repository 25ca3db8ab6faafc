"""The digits' parts are disjoint, balanced and fixed by the seed."""

import pytest
import torch

import mlo
from problems.data import NO_LABEL, digits

PARTS = ("teacher_train", "student_train", "validation", "unlabelled", "test")


def test_digits_are_split_into_disjoint_parts_with_the_classes_of_the_whole():
    splits = digits(seed=3)
    parts = [getattr(splits, name) for name in PARTS]
    assert sum(map(len, parts)) == 1797
    images = torch.cat([p.images for p in parts]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # no image is in two parts: no two of the data set are equal
    for part, fraction in zip(parts, (0.24, 0.2, 0.2, 0.16, 0.2), strict=True):
        assert part.images.shape[1:] == (1, 8, 8)
        if part is splits.unlabelled:
            assert (part.labels == NO_LABEL).all()
            continue
        counts = part.labels.bincount(minlength=10)
        assert counts.min() >= fraction * 170
        assert counts.max() <= fraction * 190
    assert abs(float(images.mean())) < 1e-5
    assert len(splits.evaluation_train) == 1797 - len(splits.unlabelled) - len(splits.test)


def test_the_seed_fixes_the_split():
    assert torch.equal(digits(1).test.images, digits(1).test.images)
    assert not torch.equal(digits(1).test.labels, digits(2).test.labels)


def test_the_images_do_not_change_from_version_to_version():
    """Published numbers stand on these splits."""
    splits = digits(0)
    assert splits.class_names == tuple("0123456789")
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 1, 8)
    assert [len(getattr(splits, name)) for name in PARTS] == [431, 361, 357, 289, 359]
    assert splits.teacher_train.labels[:12].tolist() == [1, 2, 6, 0, 3, 6, 1, 2, 5, 9, 9, 8]
    image, _ = splits.plain(splits.test)[0]
    assert torch.equal(image, splits.test.images[0])


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.2, 0.2, 0.2, 0.2, 0.3), (0.0, 0.25, 0.25, 0.25, 0.25)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(mlo.MloError, match="fractions: expected five positive numbers that sum to 1"):
        digits(0, fractions)


def test_augmentation_shifts_by_at_most_one_pixel():
    splits = digits(0)
    shifted = splits.augmented(splits.test)
    torch.manual_seed(0)
    seen = {tuple(shifted[0][0].flatten().tolist()) for _ in range(200)}
    assert 2 <= len(seen) <= 9
    padded = torch.nn.functional.pad(splits.test.images[0], (1, 1, 1, 1), value=float(splits.test.images.min()))
    allowed = {tuple(padded[:, i : i + 8, j : j + 8].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(round(v, 4) for v in s) for s in seen} <= {tuple(round(v, 4) for v in s) for s in allowed}
