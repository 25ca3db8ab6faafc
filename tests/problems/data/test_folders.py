"""ImageNet and other image folders: subsets by class, files decoded when asked for, errors that name the place."""

import re
import shutil

import pytest
import torch

import mlo
from problems.data import NO_LABEL, Fractions, image_folder, imagenet, loader
from tests.problems.data.files import write_folder

FRACTIONS = Fractions(train=0.4, validation=0.2, unlabelled=0.2)


@pytest.fixture
def root(tmp_path):
    write_folder(tmp_path / "train", {"n01": 40, "n02": 40, "n03": 40})
    write_folder(tmp_path / "val", {"n01": 2, "n02": 2, "n03": 2})
    return tmp_path


def test_imagenets_subsets_are_disjoint_by_class_and_fixed_by_the_seed(root):
    splits = imagenet(root, 0, image_size=8)
    assert splits.student_train is splits.teacher_train
    assert splits.teacher_train.labels.bincount().tolist() == [4] * 3
    assert splits.validation.labels.bincount().tolist() == [1] * 3
    assert len(splits.unlabelled) == 12
    assert (splits.unlabelled.labels == NO_LABEL).all()
    parts = [splits.teacher_train.paths, splits.validation.paths, splits.unlabelled.paths]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 27
    assert [sum(f"/{name}/" in path for path in splits.unlabelled.paths) for name in splits.class_names] == [4] * 3
    assert len(splits.evaluation_train) == 120  # all training images
    assert len(splits.evaluation_training(cutout=4)) == 120
    assert len(splits.test) == 6
    assert all("/val/" in path for path in splits.test.paths)
    assert splits.class_names == ("n01", "n02", "n03")
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (3, 3, 8)
    assert imagenet(root, 0).validation.paths == splits.validation.paths
    assert imagenet(root, 1).validation.paths != splits.validation.paths


def test_images_are_decoded_and_prepared(root):
    splits = imagenet(root, 0, image_size=8)
    raw, label = splits.test[3]
    assert raw.shape == (3, 10, 12)
    assert raw.dtype == torch.uint8
    assert (label, raw.float().mean()) == (1, 3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    plain, _ = splits.plain(splits.test)[3]
    assert plain.shape == (3, 8, 8)
    assert torch.allclose(plain, ((3 / 255 - mean) / std).expand(3, 8, 8), atol=1e-4)
    torch.manual_seed(0)
    bright = splits.augmented(splits.evaluation_train)
    means = {round(float(bright[119][0].mean()), 4) for _ in range(8)}
    assert len(means) > 4  # the colours change
    images, _ = next(iter(loader(splits.augmented(splits.teacher_train), 6)))
    assert images.shape == (6, 3, 8, 8)


def test_the_centre_is_cut_from_an_image_resized_to_256_parts_of_224(root):
    """A white frame, which the crop just leaves out: 64 pixels resized to 8/7 of 56 lose 4 on each side."""
    from PIL import Image

    path = root / "val" / "n01" / "n01_0.JPEG"
    framed = Image.new("RGB", (64, 64), "white")
    framed.paste((0, 0, 0), (4, 4, 60, 60))
    framed.save(path.with_suffix(".png"))
    path.unlink()
    plain, _ = (splits := imagenet(root, 0, image_size=56)).plain(splits.test)[0]
    assert plain.shape == (3, 56, 56)
    assert (plain < -1).all()


def test_limit_shrinks_training_and_test_images(root):
    splits = image_folder(root, 0, FRACTIONS, limit=10)
    assert splits.evaluation_train.labels.bincount().tolist() == [10] * 3
    assert splits.teacher_train.labels.bincount().tolist() == [4] * 3
    assert imagenet(root, 0, limit=40).test.labels.bincount().tolist() == [2] * 3
    assert image_folder(root, 0, FRACTIONS, limit=5).validation.labels.bincount().tolist() == [1] * 3
    with pytest.raises(mlo.MloError, match=r"found no validation images.*raise `limit`"):
        imagenet(root, 0, limit=10)


def test_grey_images_and_other_formats_become_rgb(root):
    from PIL import Image

    for mode, name in (("L", "grey.png"), ("CMYK", "print.jpg"), ("P", "palette.png")):
        Image.new(mode, (5, 5)).save(root / "val" / "n01" / name)
    splits = image_folder(root, 0, FRACTIONS, image_size=4)
    images, _ = next(iter(loader(splits.plain(splits.test), 9, shuffle=False)))
    assert images.shape == (9, 3, 4, 4)


@pytest.mark.parametrize("name", ["test", "val"])
def test_an_image_folders_test_images_are_of_test_or_val(root, name):
    (root / "val").rename(root / name)
    splits = image_folder(root, 0, FRACTIONS)
    assert all(f"/{name}/" in path for path in splits.test.paths)
    assert len(splits.evaluation_train) == 120
    with pytest.raises(mlo.MloError, match="test_fraction: expected none where there is a folder"):
        image_folder(root, 0, Fractions(train=0.4, validation=0.2, unlabelled=0.2, test=0.2))


def test_test_images_are_cut_out_of_the_training_images_where_there_are_no_others(root):
    shutil.rmtree(root / "val")
    fractions = Fractions(train=0.4, validation=0.2, unlabelled=0.1, test=0.2)
    splits = image_folder(root, 0, fractions)
    assert splits.test.labels.bincount().tolist() == [8] * 3
    assert len(splits.evaluation_train) == 96
    searched = {*splits.teacher_train.paths, *splits.validation.paths, *splits.unlabelled.paths}
    assert searched < set(splits.evaluation_train.paths)
    assert not set(splits.evaluation_train.paths) & set(splits.test.paths)
    with pytest.raises(mlo.MloError, match=r"folder .*test; found none(.|\n)*say `test_fraction`"):
        image_folder(root, 0, FRACTIONS)
    with pytest.raises(mlo.MloError, match=r"folder .*val; found none(.|\n)*ILSVRC2012_img_val"):
        imagenet(root, 0)


def flat(root):
    """As the archive of ImageNet's validation images unpacks."""
    for path in (root / "val").glob("*/*"):
        path.rename(root / "val" / path.name)


def missing(root):
    shutil.rmtree(root / "train")


def without_classes(root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()


def other_classes(root):
    (root / "val" / "n03").rename(root / "val" / "n04")


def an_empty_class(root):
    (root / "train" / "n04").mkdir()


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (missing, "expected a folder ROOT/train; found none"),
        (flat, "expected class folders in ROOT/val; found images in it, n01_0.JPEG"),
        (without_classes, "expected images of each class in ROOT/val; Couldn't find any class folder"),
        (other_classes, "expected the same classes in ROOT/train and ROOT/val; found in one only: n03, n04"),
        (an_empty_class, "expected images of each class in ROOT/train; Found no valid file for the classes n04"),
    ],
)
def test_wrong_layouts_are_named(root, damage, finding):
    damage(root)
    for build in (lambda: imagenet(root, 0), lambda: image_folder(root, 0, FRACTIONS)):
        with pytest.raises(mlo.MloError, match=re.escape(finding.replace("ROOT", str(root)))) as caught:
            build()
        assert "Expected layout" in str(caught.value)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def no_image(path):
    path.write_bytes(b"<html>404</html>")


def empty(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_off, no_image, empty, gone])
def test_damaged_images_are_named(root, damage):
    splits = imagenet(root, 0, image_size=8)
    path = root / "val" / "n02" / "n02_1.JPEG"
    damage(path)
    with pytest.raises(mlo.MloError, match=rf"^image {re.escape(str(path))}: expected a complete image file") as caught:
        list(loader(splits.plain(splits.test), 2, shuffle=False))
    assert "in the folder of its class" in str(caught.value)


@pytest.mark.parametrize("name", ["train", "validation", "unlabelled", "test"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.5])
def test_fractions_are_checked(name, value):
    given = {"train": 0.1, "validation": 0.1, "unlabelled": 0.1, "test": 0.1, name: value}
    with pytest.raises(mlo.MloError, match=f"fraction of {name} images: expected a number in"):
        Fractions(**given)


def test_fractions_of_one_folder_are_disjoint(root):
    with pytest.raises(mlo.MloError, match="train, validation, unlabelled images: expected a sum of at most 1"):
        imagenet(root, 0, Fractions(train=0.5, validation=0.4, unlabelled=0.2))
