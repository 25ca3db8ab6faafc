"""CIFAR as in LBT: halves by class, the other CIFAR without labels, and errors that name the file."""

import os
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

import mlo
from problems.data import NO_LABEL, Fractions, cifar
from tests.problems.data.files import write_cifar


@pytest.fixture
def root(tmp_path, monkeypatch):
    """CIFAR-10 with 200 training and 40 test images, CIFAR-100 with 300 and 300."""
    write_cifar(CIFAR10, tmp_path, monkeypatch, per_class=4)
    write_cifar(CIFAR100, tmp_path, monkeypatch, per_class=3)
    return tmp_path


@pytest.fixture
def served(root, monkeypatch):
    """The published archives, on a server of our own."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root / "published"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for dataset in (CIFAR10, CIFAR100):
        monkeypatch.setattr(dataset, "url", f"http://127.0.0.1:{server.server_port}/{dataset.filename}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def rows(images):
    return {image.numpy().tobytes() for image in images}


def test_the_training_images_are_halved_by_class_and_the_other_cifars_are_unlabelled(root):
    splits = cifar(10, root, seed=0)
    train, validation = splits.teacher_train, splits.validation
    assert splits.student_train is train
    for part in (train, validation):
        assert part.labels.bincount().tolist() == [10] * 10
        assert part.images.dtype == torch.uint8
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)  # images and labels still belong together
    assert not rows(train.images) & rows(validation.images)
    assert rows(train.images) | rows(validation.images) == rows(splits.evaluation_train.images)
    assert splits.test.labels.bincount().tolist() == [4] * 10
    others = cifar(100, root, seed=0)
    assert len(splits.unlabelled) == 200  # no more than there are training images
    assert rows(splits.unlabelled.images) <= rows(others.evaluation_train.images)
    assert rows(others.unlabelled.images) == rows(splits.evaluation_train.images)
    assert (splits.unlabelled.labels == NO_LABEL).all()
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 3, 32)
    assert splits.class_names[3] == "class 3"
    assert others.num_classes == 100


def test_the_seed_fixes_the_split(root):
    first, again, other = (cifar(10, root, seed).validation for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_fractions_and_limit_shrink_it(root):
    fractions = Fractions(train=0.5, validation=0.25, unlabelled=0.5)
    splits = cifar(10, root, 0, fractions, limit=8)
    assert splits.evaluation_train.labels.bincount().tolist() == [8] * 10
    assert splits.teacher_train.labels.bincount().tolist() == [4] * 10
    assert splits.validation.labels.bincount().tolist() == [2] * 10
    assert len(splits.unlabelled) == 40
    assert splits.test.labels.bincount().tolist() == [4] * 10
    assert cifar(10, root, 0, fractions, limit=2).test.labels.bincount().tolist() == [2] * 10
    with pytest.raises(mlo.MloError, match="found no validation images"):
        cifar(10, root, 0, Fractions(train=0.5, validation=0.2, unlabelled=1.0), limit=2)
    with pytest.raises(mlo.MloError, match="expected a sum of at most 1"):
        cifar(10, root, 0, Fractions(train=0.8, validation=0.3, unlabelled=1.0))


def test_images_are_padded_by_four_cropped_flipped_and_normalized(root):
    splits = cifar(10, root, 0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    raw = splits.test.images[0]
    plain, label = splits.plain(splits.test)[0]
    assert torch.allclose(plain, (raw / 255 - mean) / std, atol=1e-3)
    assert label == splits.test.labels[0]
    padded = torch.nn.functional.pad(raw, (4, 4, 4, 4))
    places = {(i, j, flip) for i in range(9) for j in range(9) for flip in (False, True)}

    def crop(i, j, flip):
        part = padded[:, i : i + 32, j : j + 32]
        return (((part.flip(-1) if flip else part) / 255 - mean) / std)[:, 8:24, 8:24]

    crops = {place: crop(*place) for place in places}
    augmented, evaluation = splits.augmented(splits.test), splits.evaluation_training(cutout=None)
    assert len(evaluation) == 200
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        image, _ = augmented[0]
        assert image.shape == (3, 32, 32)
        matching = {at for at, part in crops.items() if torch.allclose(part, image[:, 8:24, 8:24], atol=2e-3)}
        assert len(matching) == 1
        seen |= matching
    assert len(seen) > 15
    assert len({flip for _, _, flip in seen}) == 2
    torch.manual_seed(0)
    first, _ = evaluation[3]
    torch.manual_seed(0)
    cut, _ = splits.evaluation_training(cutout=16)[3]
    changed = (first != cut).any(dim=0)
    assert 64 <= int(changed.sum()) <= 256
    assert (cut[:, changed] == 0).all()


def test_missing_files_are_named_with_the_layout_and_where_to_get_them(tmp_path):
    with pytest.raises(mlo.MloError) as caught:
        cifar(10, tmp_path, 0)
    message = str(caught.value)
    assert f"{tmp_path / 'cifar-10-batches-py' / 'data_batch_3'}: missing" in message
    assert "Expected layout" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert "download: true" in message


def test_a_missing_other_cifar_is_named(root):
    shutil.rmtree(root / "cifar-100-python")
    with pytest.raises(mlo.MloError, match=r"CIFAR100: expected the published files.*\n.*cifar-100-python/train: miss"):
        cifar(10, root, 0)


class Trap:
    """A pickle that does something when it is read."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def half_written(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken(path):
    path.write_bytes(b"\x80\x04 this is no pickle")


def malicious(path):
    path.write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize("damage", [half_written, broken, malicious])
@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_2", "cifar-10-batches-py/batches.meta"])
def test_damaged_files_are_named_and_never_unpickled(root, monkeypatch, damage, name):
    monkeypatch.chdir(root)
    damage(root / name)
    with pytest.raises(mlo.MloError) as caught:
        cifar(10, root, 0)
    assert f"{root / name}: damaged or cut off" in str(caught.value)
    assert str(caught.value).count(": damaged") == 1
    assert "Expected layout" in str(caught.value)
    assert not (root / "trapped").exists()


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_download_mends_what_is_damaged_and_fetches_what_is_missing(root, served, name):
    splits = cifar(10, root, 0)
    half_written(root / "cifar-10-batches-py" / name)
    shutil.rmtree(root / "cifar-100-python")
    again = cifar(10, root, 0, download=True)
    assert torch.equal(again.teacher_train.images, splits.teacher_train.images)
    assert torch.equal(again.unlabelled.images, splits.unlabelled.images)


def test_a_download_without_network_says_so(root, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    half_written(root / "cifar-10-batches-py" / "test_batch")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens there
    with pytest.raises(mlo.MloError, match=r"cannot download http://127\.0\.0\.1:9/.*refused.*network(.|\n)*layout"):
        cifar(10, root, 0, download=True)


def test_a_download_of_something_else_is_refused(root, served, monkeypatch):
    half_written(root / "cifar-10-batches-py" / "test_batch")
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(mlo.MloError, match=r"cannot download .*corrupted"):
        cifar(10, root, 0, download=True)
