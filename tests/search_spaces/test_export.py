import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save

from mlo.errors import MloError
from problems.search_spaces import PUBLISHED, EvaluationNetwork, export_network, load_network


def trained(**options):
    """A network whose statistics have moved, so that evaluation mode shows them."""
    torch.manual_seed(0)
    network = EvaluationNetwork(PUBLISHED["PDARTS"], 10, channels=2, num_cells=3, in_channels=1, **options)
    network(torch.randn(4, 1, 64, 64) + 1)
    return network


@pytest.fixture
def folder(tmp_path):
    return export_network(trained(), tmp_path / "deep" / "network")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_round_trip_gives_the_same_outputs_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    network = EvaluationNetwork(PUBLISHED[name], 7, channels=2, num_cells=3, in_channels=2)
    network(torch.randn(4, 2, 8, 8) + 1)
    images = torch.randn(3, 2, 8, 8)
    loaded = load_network(export_network(network, tmp_path))
    assert torch.equal(loaded(images).main, network.eval()(images).main)
    assert loaded.shape == network.shape


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_auxiliary_head_is_left_out_and_the_network_as_it_was(stem, tmp_path):
    network = trained(auxiliary=True, stem=stem)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folder = export_network(network, tmp_path)
    assert not [name for name in load_file(folder / "network.safetensors") if "auxiliary" in name]
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    loaded = load_network(folder)
    assert loaded.auxiliary_head is None
    assert not loaded.training
    images = torch.randn(2, 1, 64, 64)
    assert torch.equal(loaded(images).main, network.eval()(images).main)


def test_loading_draws_nothing_and_the_network_can_be_trained_further(folder):
    before = torch.get_rng_state()
    network = load_network(folder)
    assert torch.equal(torch.get_rng_state(), before)
    network.train()(torch.randn(2, 1, 8, 8)).main.sum().backward()
    assert all(p.device.type == "cpu" and p.requires_grad for p in network.parameters())
    assert network.classifier.weight.grad.abs().sum() > 0


def test_an_older_network_is_replaced(folder):
    other = EvaluationNetwork(PUBLISHED["NASNet"], 3, channels=2, num_cells=3)
    assert load_network(export_network(other, folder)).shape == other.shape
    assert {path.name for path in folder.iterdir()} == {"network.json", "network.safetensors"}


def test_a_compiled_network_and_one_with_modules_in_common(tmp_path):
    network = trained().eval()
    network.cells[0].operations[4] = network.cells[0].operations[3]
    images = torch.randn(2, 1, 16, 16)
    for each in (network, torch.compile(network)):
        assert torch.equal(load_network(export_network(each, tmp_path))(images).main, network(images).main)


def test_a_network_that_was_changed_is_refused_before_anything_is_written(tmp_path):
    network = trained()
    network.classifier = torch.nn.Linear(network.classifier.in_features, 5)
    with pytest.raises(MloError, match=r"found classifier\.bias of shape \(5,\) in the place of \(10,\)"):
        export_network(network, tmp_path / "network")
    assert not (tmp_path / "network").exists()


@pytest.mark.parametrize("name", ["network.json", "network.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(MloError, match=f"{name} cannot be read: No such file"):
        load_network(folder)
    with pytest.raises(MloError, match="expected the folder of an exported network"):
        load_network(folder / "elsewhere")


@pytest.mark.parametrize("where", [8, 200, -1])
def test_damaged_weights_are_refused(folder, where):
    path = folder / "network.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(MloError, match=r"network\.safetensors: expected the weights that network\.json was written"):
        load_network(folder)


def change_description(folder, **changes):
    path = folder / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"no weights", "expected the weights of the network in network.json"),
        (save({"classifier.weight": torch.zeros(2, 2)}), r"(?s)size mismatch for classifier\.weight"),
    ],
)
def test_foreign_weights_are_refused(folder, weights, message):
    (folder / "network.safetensors").write_bytes(weights)
    change_description(folder, weights_sha256=hashlib.sha256(weights).hexdigest())
    with pytest.raises(MloError, match=message):
        load_network(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"channels": "many"}, "channels: Input should be a valid integer"),
        ({"num_cells": 0}, "num_cells: Input should be greater than 0"),
        ({"stem": "mnist"}, "stem: Input should be 'cifar' or 'imagenet'"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"genotype": {"normal": []}}, "a genotype has the fields normal, normal_concat"),
        ({"channels": 3}, "size mismatch for"),
        ({"channels": 2**63 - 1}, "expected the description of an exported network"),
    ],
)
def test_a_foreign_description_is_refused(folder, changes, message):
    change_description(folder, **changes)
    with pytest.raises(MloError, match=message):
        load_network(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', "\x00\xff"])
def test_what_is_no_description_is_refused(folder, text):
    (folder / "network.json").write_text(text)
    with pytest.raises(MloError, match=r"network\.json: expected the description of an exported network"):
        load_network(folder)
