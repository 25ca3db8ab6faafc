"""The splits are disjoint, balanced and fixed by the seed; loaders repeat."""

import pytest
import torch

import mlo
from problems.data import Images, Together, digits, loader, split_by_class
from problems.students import StudentResNet

PARTS = ("teacher_train", "student_train", "validation", "unlabelled", "test")


def test_digits_are_split_into_disjoint_parts_with_the_classes_of_the_whole():
    splits = digits(seed=3)
    parts = [getattr(splits, name) for name in PARTS]
    assert sum(map(len, parts)) == 1797
    images = torch.cat([p.images for p in parts]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # no image is in two parts: no two of the data set are equal
    for part, fraction in zip(parts, (0.24, 0.2, 0.2, 0.16, 0.2), strict=True):
        assert part.images.shape[1:] == (1, 8, 8)
        counts = part.labels.bincount(minlength=10)
        assert counts.min() >= fraction * 170
        assert counts.max() <= fraction * 190
    assert abs(float(images.mean())) < 1e-5
    assert len(splits.labelled) == 1797 - len(splits.unlabelled) - len(splits.test)


def test_the_seed_fixes_the_split():
    assert torch.equal(digits(1).test.images, digits(1).test.images)
    assert not torch.equal(digits(1).test.labels, digits(2).test.labels)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.2, 0.2, 0.2, 0.2, 0.3), (0.0, 0.25, 0.25, 0.25, 0.25)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(mlo.MloError, match="fractions: expected five positive numbers that sum to 1"):
        digits(0, fractions)


def test_augmentation_shifts_by_at_most_one_pixel():
    splits = digits(0)
    image = splits.test.images[0]
    torch.manual_seed(0)
    seen = {tuple(splits.augmentation(image).flatten().tolist()) for _ in range(200)}
    assert 2 <= len(seen) <= 9
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=float(splits.test.images.min()))
    allowed = {tuple(padded[:, i : i + 8, j : j + 8].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(round(v, 4) for v in s) for s in seen} <= {tuple(round(v, 4) for v in s) for s in allowed}


def test_loaders_batch_and_shuffle():
    images = Images(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    torch.manual_seed(0)
    batches = list(loader(images, 4))
    assert [len(y) for _, y in batches] == [4, 4]
    assert len(torch.cat([y for _, y in batches]).unique()) == 8
    ordered = list(loader(images, 4, shuffle=False))
    assert torch.equal(torch.cat([y for _, y in ordered]), torch.arange(10))
    with pytest.raises(mlo.MloError, match="found batches of 11 images and a part of 10"):
        loader(images, 11)


def test_together_is_as_long_as_the_longest():
    long = loader(Images(torch.zeros(8, 1, 1, 1), torch.arange(8)), 2, shuffle=False)
    short = loader(Images(torch.zeros(3, 1, 1, 1), torch.arange(3)), 2, shuffle=False)
    drawn = [(a[1].tolist(), b[1].tolist()) for a, b in Together(long, short)]
    assert drawn == [([0, 1], [0, 1]), ([2, 3], [2]), ([4, 5], [0, 1]), ([6, 7], [2])]


def test_split_by_class_covers_everything_once():
    labels = torch.arange(30) % 3
    parts = split_by_class(labels, (0.5, 0.3, 0.2), torch.Generator().manual_seed(0))
    assert [len(p) for p in parts] == [15, 9, 6]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(30))


def test_students_are_torchvisions_at_full_width():
    assert sum(p.numel() for p in StudentResNet(18, 1000, small_images=False).parameters()) == 11_689_512
    assert sum(p.numel() for p in StudentResNet(50, 1000, small_images=False).parameters()) == 25_557_032
    small = StudentResNet(50, 10, 1, width=4)
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="expected depth 18 or 50"):
        StudentResNet(34, 10)
