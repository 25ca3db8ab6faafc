"""`mlo evaluate`: from a genotype to a tested, exported network."""

import csv
import json
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mlo.cli import main
from mlo.recipes import installed_problems, load_recipe
from mlo.runs import Interrupted, Run, resume
from problems.evaluation_experiment import EvaluationExperiment
from problems.search_spaces import PUBLISHED, load_network
from tests.toys import signal_at_call

SCHEMAS = {name: kind.recipe_type for name, kind in installed_problems().items()}
SMALL = ("evaluation.channels=4", "evaluation.epochs=1", "evaluation.auxiliary_weight=0.4", "checkpoint_every=7")
FLAGS = [flag for setting in SMALL for flag in ("--set", setting)]


def invoke(*arguments):
    return CliRunner().invoke(main, [*arguments, "--recipe", "evaluate/digits", *FLAGS, "--quiet"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    done = invoke("evaluate", "PDARTS", "--output", str(folder))
    assert done.exit_code == 0, done.output
    return folder


def test_what_it_leaves(folder):
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["test_error_top5"] < result["test_error"] < 90
    assert json.loads((folder / "genotype.json").read_text()) == PUBLISHED["PDARTS"].to_json()
    names = {path.name for path in folder.iterdir()}
    assert {"confusion.png", "confusion.svg", "confusion.csv", "curves.png", "cell_normal.png", "network"} <= names
    page = (folder / "report.html").read_text()
    assert "trained from scratch" in page
    assert "Confusion matrix" in page
    assert "A cell was searched" not in page


def test_the_confusion_matrix_is_that_of_the_test_images(folder):
    rows = list(csv.reader((folder / "confusion.csv").read_text().splitlines()))
    counts = torch.tensor([[int(count) for count in row[1:]] for row in rows[1:]])
    error = 100.0 * (1 - counts.diagonal().sum() / counts.sum())
    assert float(error) == pytest.approx(json.loads((folder / "result.json").read_text())["test_error"], abs=1e-4)
    assert rows[0] == ["true class", *(row[0] for row in rows[1:])]


def test_the_exported_network_is_the_trained_one(folder):
    data = load_recipe("evaluate/digits", SMALL, schemas=SCHEMAS).data.build(0)
    test = data.plain(data.test)
    network, wrong = load_network(folder / "network"), 0
    for image, label in test:
        wrong += int(network(image[None]).main.argmax() != label)
    assert 100.0 * wrong / len(test) == json.loads((folder / "result.json").read_text())["test_error"]


def test_a_run_or_a_file_can_be_evaluated(folder, tmp_path):
    for index, subject in enumerate((folder, folder / "genotype.json")):
        done = invoke("evaluate", str(subject), "--set", "rounds=2", "--output", str(tmp_path / str(index)))
        assert done.exit_code == 0, done.output
        assert (tmp_path / str(index) / "genotype.json").read_text() == (folder / "genotype.json").read_text()


def test_an_interrupted_training_goes_on_exactly(folder, tmp_path):
    recipe = load_recipe("evaluate/digits", (*SMALL, "genotype=PDARTS"), schemas=SCHEMAS)

    class Interrupting(EvaluationExperiment):
        def _build(self, data):
            graph, rounds = super()._build(data)
            signal_at_call(graph["network"].module, 12, signal.SIGTERM)
            return graph, rounds

    begun = Run.begin(tmp_path / "run", recipe, "evaluate/digits", progress=False)
    with pytest.raises(Interrupted):
        begun.execute(Interrupting(recipe))
    again = resume(tmp_path / "run", lambda _: recipe, progress=False)
    result, expected = again.execute(EvaluationExperiment(recipe)), json.loads((folder / "result.json").read_text())
    assert result["test_error"] == expected["test_error"]
    ours, theirs = (load_network(f / "network").state_dict() for f in (tmp_path / "run", folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("subject", "content", "message"),
    [
        ("PDART", None, "unknown genotype 'PDART': did you mean 'PDARTS'?"),
        ("gone.json", None, "gone.json"),
        ("folder", "", "found no genotype.json and no recipe.yaml in it"),
        ("bad.json", "{", "bad.json: expected a genotype as JSON"),
        ("other.json", '{"normal": []}', "a genotype has the fields normal, normal_concat, reduce, reduce_concat"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(subject, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content == "":
        (tmp_path / subject).mkdir()
    elif content is not None:
        (tmp_path / subject).write_text(content)
    done = invoke("evaluate", subject, "--output", "out")
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    """They would be split otherwise, and the test would be on images that were trained on."""
    for label in ("a", "b"):
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for index in range(10):
            image = Image.fromarray(np.full((8, 8, 3), 20 * index + (50 if label == "b" else 0), dtype=np.uint8))
            image.save(tmp_path / "data" / "train" / label / f"{index}.png")
    data = f"data={{kind: image_folder, root: {tmp_path / 'data'}, image_size: 8, test_fraction: 0.2}}"
    out = tmp_path / "run"
    begun = invoke("evaluate", "PDARTS", "--output", str(out), "--set", data, "--set", "evaluation.batch_size=8")
    assert begun.exit_code == 0, begun.output
    (out / "result.json").unlink()
    again = CliRunner().invoke(main, ["resume", str(out), "--quiet"])
    assert again.exit_code == 0, again.output
    (out / "result.json").unlink()
    (tmp_path / "data" / "train" / "a" / "3.png").unlink()
    refused = CliRunner().invoke(main, ["resume", str(out), "--quiet"])
    assert refused.exit_code == 2
    assert "expected the images that the run began with; found others" in " ".join(refused.output.split())
    assert not (out / "result.json").exists()


def test_a_subject_that_is_nowhere_and_a_folder_that_is_no_run(tmp_path):
    assert "found no such file" in invoke("evaluate", str(tmp_path / "nosuch")).output
    assert "found no genotype.json and no recipe.yaml in it" in invoke("evaluate", str(tmp_path)).output
