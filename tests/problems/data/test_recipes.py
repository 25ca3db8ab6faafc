"""Each kind of data is a recipe's part: typed, with the protocol's fractions as defaults, and built by its kind."""

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from torchvision.datasets import CIFAR10, CIFAR100

from problems.data import DataRecipe
from tests.problems.data.files import write_cifar, write_folder

DATA = TypeAdapter(DataRecipe)


def parse(**data):
    """As recipes are read, from JSON and strictly."""
    return DATA.validate_json(json.dumps(data), strict=True)


def test_each_kind_builds_its_data(tmp_path, monkeypatch):
    write_cifar(CIFAR10, tmp_path, monkeypatch, per_class=2)
    write_cifar(CIFAR100, tmp_path, monkeypatch, per_class=4)
    write_folder(tmp_path / "train", {"a": 40, "b": 40})
    write_folder(tmp_path / "val", {"a": 1, "b": 1})
    root = str(tmp_path)
    built = {
        kind: parse(kind=kind, root=root, num_workers=2).build(0)
        for kind in ("cifar10", "cifar100", "imagenet", "image_folder")
    }
    built["digits"] = parse(kind="digits", num_workers=2).build(0)
    assert {kind: splits.num_classes for kind, splits in built.items()} == {
        "cifar10": 10,
        "cifar100": 100,
        "imagenet": 2,
        "image_folder": 2,
        "digits": 10,
    }
    assert [splits.num_workers for splits in built.values()] == [2] * 5
    assert len(built["cifar10"].teacher_train) == len(built["cifar10"].validation) == 50
    assert [len(built["imagenet"].teacher_train), len(built["imagenet"].validation)] == [8, 2]
    assert [len(built["image_folder"].teacher_train), len(built["image_folder"].validation)] == [32, 16]
    small = parse(kind="cifar100", root=root, limit=2, train_fraction=0.5, validation_fraction=0.5, download=True)
    assert len(small.build(0).teacher_train) == 100
    sized = parse(kind="image_folder", root=root, image_size=16, unlabelled_fraction=0.1, limit=20)
    assert (sized.build(0).image_size, len(sized.build(0).unlabelled)) == (16, 4)


def test_the_documented_recipes_are_valid_and_show_every_kind():
    document = Path(__file__).parents[3] / "docs" / "data.md"
    blocks = re.findall(r"^```yaml\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    parsed = [parse(**yaml.safe_load(block)["data"]) for block in blocks]
    assert sorted(part.kind for part in parsed) == ["cifar10", "cifar100", "digits", "image_folder", "imagenet"]


@pytest.mark.parametrize("kind", ["imagenet", "image_folder", "cifar10"])
def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}/images/"):
        parse(kind=kind, root="~/images").build(0)
    assert not Path("~").exists()


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        ({"kind": "cifar10"}, "root"),
        ({"kind": "cifar10", "root": ""}, "root"),
        ({"kind": "cifar10", "root": "x", "image_size": 32}, "image_size"),
        ({"kind": "cifar10", "root": "x", "train_fraction": 0.7}, "sum of at most 1"),
        ({"kind": "imagenet", "root": "x", "train_fraction": 0.95}, "sum of at most 1"),
        ({"kind": "imagenet", "root": "x", "download": True}, "download"),
        ({"kind": "imagenet", "root": "x", "limit": 0}, "limit"),
        ({"kind": "image_folder", "root": "x", "test_fraction": 0.3}, "sum of at most 1"),
        ({"kind": "image_folder", "root": "x", "validation_fraction": 0}, "validation_fraction"),
        ({"kind": "digits", "num_workers": -1}, "num_workers"),
        ({"kind": "mnist"}, "image_folder"),
    ],
)
def test_wrong_recipes_are_refused(data, finding):
    with pytest.raises(ValidationError, match=finding):
        parse(**data)
