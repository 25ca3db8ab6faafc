import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mlo.errors import MloError
from problems.report import PICTURES, curves_figure, draw_curves, write_report
from problems.search_spaces.genotypes import PUBLISHED
from tests.pictures import assert_is_drawn, outside, overlapping, svg_texts, text_boxes

RESULT = {
    "test_error": 3.1,
    "random_cell_test_error": 3.9,
    "alpha_change": 0.0625,
    "num_parameters": 123456,
    "search_seconds": 80.2,
    "evaluation_seconds": 7265.0,
    "seed": 17,
    "recipe": "lbt/digits",
    "versions": {"mlo": "0.1.0", "torch": "2.9.9", "python": "3.12.1"},
    "train_accuracy": 0.875,
}
METRICS = [
    {"phase": "search", "round": 1, "teacher.loss": 2.5, "round_seconds": 0.31},
    {
        "phase": "search",
        "round": 2,
        "teacher.loss": 1.25,
        "teacher.accuracy": 0.5,
        "architecture.teacher_accuracy": 0.4,
    },
    {"phase": "random_cell", "round": 1, "network.loss": 0.75, "network.learning_rate": 0.025},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("kind: lbt\nseed: 17\n")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "genotype.json").write_text(json.dumps(PUBLISHED["DARTS_V2"].to_json()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"picture " + name.encode())
    return tmp_path


class Page(HTMLParser):
    """What a browser would make of a page: its tags, the addresses it refers to, its style sheet and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts, self.style, self.open = [], [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in {"src", "srcset", "href", "data", "action", "poster", "background"}:
                self.addresses.append(value)
            if name == "style":
                self.style += value

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_a_report_holds_everything_and_refers_to_nothing(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    embedded = [base64.b64decode(address.partition(";base64,")[2]) for address in page.addresses]
    assert sorted(embedded) == sorted(b"picture " + name.encode() for name in PICTURES)
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", address) for address in page.addresses)
    assert not re.search(r"url\(|@import|http", page.style)
    assert "script" not in page.tags
    assert "link" not in page.tags
    for text in (
        *(
            "lbt/digits",
            "Seed 17",
            "0.80 points less",
            "3.10 %",
            "3.90 %",
            "123,456",
            "0.0625",
            "1 min 20 s",
            "2 h 01 min",
        ),
        *("mlo 0.1.0, torch 2.9.9, python 3.12.1", "mlo run recipe.yaml --seed 17", "kind: lbt seed: 17"),
        *("dil_conv_3x3(2)", "concat(2, 3, 4, 5)", '["dil_conv_3x3", 2]', "train_accuracy 87.50 %"),
        *(
            "search random cell",
            "round 2 1",
            "teacher.loss 1.25 \N{EN DASH}",
            "teacher.accuracy 50.00 % \N{EN DASH}",
            "round_seconds 0.31 s \N{EN DASH}",
        ),
        *(
            "architecture.teacher_accuracy 40.00 % \N{EN DASH}",
            "network.loss \N{EN DASH} 0.75",
            "network.learning_rate \N{EN DASH} 0.025",
        ),
    ):
        assert text in page.text


def test_the_same_run_has_the_same_report(folder):
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


@pytest.mark.parametrize(
    ("found", "random", "verdict"),
    [
        (3.0, 4.0, "1.00 points less"),
        (4.5, 4.0, "0.50 points more"),
        (4.001, 4.0, "as often as"),
        (0.0, 0.0, "as often as"),
    ],
)
def test_the_verdict_is_honest(folder, found, random, verdict):
    (folder / "result.json").write_text(json.dumps(RESULT | {"test_error": found, "random_cell_test_error": random}))
    assert verdict in Page(write_report(folder).read_text(encoding="utf-8")).text


def test_hostile_text_stays_text(folder):
    hostile = "<script>alert('x')</script><img src=http://a.b onerror=c>"
    versions = {hostile: hostile}
    (folder / "result.json").write_text(
        json.dumps(RESULT | {"recipe": hostile, "versions": versions, "seed": hostile, hostile: hostile})
    )
    (folder / "recipe.yaml").write_text(f"</pre></details>{hostile}{{{{ 1 + 1 }}}}")
    (folder / "metrics.jsonl").write_text(json.dumps({"phase": hostile, "round": 1, f"{hostile}.loss": 1.0}))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.tags.count("img") == len(PICTURES)
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert page.text.count(hostile) == 12
    assert "{{ 1 + 1 }}" in page.text


@pytest.mark.parametrize("name", ["recipe.yaml", "result.json", "genotype.json", "metrics.jsonl", *PICTURES])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(MloError, match=rf"finished run in .* Missing there: {re.escape(name)}\."):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", "{", r"result\.json: expected JSON"),
        ("result.json", "[]", r"result\.json: expected an object with the keys .*Missing: test_error, "),
        ("result.json", json.dumps({**RESULT, "test_error": None}), r"'test_error' to be a finite number. Got None"),
        ("genotype.json", "{}", r"genotype\.json: .* Missing: normal, normal_concat, reduce, reduce_concat"),
        ("genotype.json", json.dumps({**PUBLISHED["DARTS_V2"].to_json(), "normal": []}), r"genotype\.json: "),
        ("metrics.jsonl", '{"phase": "search", "round": 1}\n{"phase": ', r"metrics\.jsonl, line 2: expected JSON"),
        ("metrics.jsonl", '{"round": 1}\n', r"metrics\.jsonl, line 1: .*Missing: phase"),
    ],
)
def test_a_broken_file_is_named(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(MloError, match=message):
        write_report(folder)


def many_metrics(num_rounds):
    return [
        {
            "phase": phase,
            "round": index + 1,
            f"{level}.loss": 2.0 / (index + 1),
            f"{level}.accuracy": index / num_rounds,
        }
        for phase, level in (("search", "teacher"), ("evaluation", "network"), ("random_cell", "network"))
        for index in range(num_rounds)
    ]


@pytest.mark.parametrize("num_rounds", [1, 20, 2000])
def test_curves_can_be_read(num_rounds):
    figure = curves_figure(many_metrics(num_rounds))
    texts = text_boxes(figure)
    assert overlapping(texts) == []
    assert outside(figure, texts) == []
    found = {text for text, _ in texts}
    assert {"search", "evaluation", "random cell", "loss", "accuracy (%)", "teacher", "network"} <= found
    assert any(text.startswith("round") for text in found)
    assert all(len(axes.lines) == (2 if num_rounds > 60 else 1) for axes in figure.axes)


def test_a_panel_shows_its_phase_and_kind_of_metric():
    figure = curves_figure(METRICS)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert titles == ["search", "random cell", "", ""]
    assert labels == ["loss", "", "accuracy (%)", ""]
    lines = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert lines == [[[[1.0, 2.5], [2.0, 1.25]]], [[[1.0, 0.75]]], [[[2.0, 50.0]], [[2.0, 40.0]]], []]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "teacher",
        "architecture: teacher",
        "network",
    ]


def test_a_running_mean_is_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    metrics = [{"phase": "search", "round": index, "a.loss": value} for index, value in enumerate(values.tolist())]
    raw, mean = curves_figure(metrics).axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    assert mean.get_ydata()[200] == pytest.approx(values[195:205].mean())
    assert mean.get_ydata()[0] == pytest.approx(values[:5].mean())


def test_gaps_and_what_is_no_number_are_left_out():
    lines = [
        {"phase": "p", "round": 1, "a.loss": float("nan"), "a.note": "text"},
        {"phase": "p", "round": 2, "a.loss": 1.0},
    ]
    (axes,) = curves_figure(lines).axes
    assert axes.lines[0].get_xydata().tolist() == [[2.0, 1.0]]
    with pytest.raises(MloError, match="Expected a metric of a level"):
        curves_figure(lines[:1])


def test_curves_are_written(tmp_path):
    for name in ("one.svg", "two.svg", "one.png"):
        draw_curves(tmp_path / name, METRICS)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert {"search", "random cell", "teacher", "network"} <= set(svg_texts(tmp_path / "one.svg"))
    assert_is_drawn(tmp_path / "one.png")
