"""The speed benchmarks run, say what they measured, and stop where two methods do not compute the same."""

import json
import math
import os
import signal
from functools import partial

import pytest
import torch

from problems.search_spaces import Architecture, Supernet
from problems.search_spaces.cells import SearchCell

from .speed import cleaning, compiled, depth, lbt_step, overhead, unrolling
from .speed.__main__ import BEGIN, BENCHMARKS, END, QUICK, main, merged, run, write
from .speed.memory import MEASURABLE, peak
from .speed.report import Benchmark, agree, line_chart
from .speed.timing import Measured, Method, measure, of


def few(benchmark, *libraries):
    """The benchmark with the methods of some libraries alone ("" for those by hand)."""
    chosen = [m for m in benchmark.methods if m.library in libraries]
    return Benchmark(benchmark.name, benchmark.title, benchmark.run, chosen)


def rows(text, name):
    return [line.split("|")[2:-1] for line in text.splitlines() if line.startswith(f"| {name}")]


@pytest.mark.parametrize("name", ["overhead", "depth"])
def test_times_beside_the_loop_by_hand(name):
    benchmark = next(b for b in BENCHMARKS if b.name == name)
    *_, (text, numbers, _) = run([few(benchmark, "", "mlo", "TorchOpt")], quick=True)
    assert f"## {benchmark.title}" in text
    assert "torch" in text.splitlines()[0]
    assert {one["error"] for one in numbers[name]["found"]["measured"]} == {""}
    if name == "overhead":
        assert numbers[name]["found"]["agreement"]["mlo FiniteDifference()"] < 1e-9
        assert numbers[name]["found"]["agreement"]["TorchOpt MetaSGD"] < 1e-9
        assert all(float(cells[1].split()[0]) > 0 for cells in rows(text, "mlo"))
        assert len(rows(text, "mlo")) == 2
    else:
        assert numbers[name]["found"]["agreement"] < depth.AGREEMENT
        assert len(rows(text, "3 ")[0]) == 2


def test_compilation_is_timed_too(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(module) or module)
    result = compiled.run(compiled.METHODS, quick=True)
    assert len(asked) == 1
    assert [one["error"] for one in result.raw["measured"]] == ["", ""]
    first = result.raw["first rounds"]
    assert set(first) == {"mlo", "mlo, compiled"}
    assert f"Seconds of the first round, the compilation included: mlo {first['mlo']:.1f}, mlo, comp" in result.text


def test_the_published_cell_is_the_plain_one():
    torch.manual_seed(0)
    plain, published = (Supernet(10, 4, 3, cell=cell).double() for cell in (SearchCell, lbt_step.PublishedCell))
    published.load_state_dict(plain.state_dict())
    images, architecture = torch.randn(2, 3, 8, 8).double(), Architecture().double()
    torch.testing.assert_close(published(images, architecture()), plain(images, architecture()))


def passes(module):
    """Count the forward passes of a module and the backward passes that reach its output."""
    counts = [0, 0]

    def forward(module, args, output):
        counts[0] += 1
        if output.requires_grad:
            output.register_hook(backward)

    def backward(gradient):
        counts[1] += 1

    module.register_forward_hook(forward)
    return counts


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("authors' schedule, plain supernet", [14, 12], [7, 5]),
        ("10 forward and 8 backward passes alone", [5, 5], [5, 3]),
        ("Betty, our supernet", [9, 9], [7, 3]),
        ("mlo", [5, 5], [5, 3]),
        ("mlo, one-sided", [4, 4], [4, 3]),
    ],
)
def test_passes_of_a_step(name, teacher, student):
    library, cell, memory_format, make = lbt_step.LBT[name]
    if library == "Betty":
        pytest.importorskip("betty")
    networks = lbt_step.Networks.of(0, cell, memory_format)
    work = make(networks)
    work(1)  # what is traced once is over
    counts = passes(networks.teacher), passes(networks.student)
    before = [p.detach().clone() for p in networks.architecture.parameters()]
    work(1)
    assert not any(map(torch.equal, before, networks.architecture.parameters())) or "alone" in name
    assert counts == (teacher, student)


def test_what_does_not_fit_into_memory_is_left_out_and_named(monkeypatch):
    methods = [m for m in lbt_step.methods("lbt") if m.name in ("mlo", "mlo, plain supernet")]
    peaks = {"mlo": 2048.0, "mlo, plain supernet": 3072.0}
    monkeypatch.setattr(lbt_step, "SIZES", {**lbt_step.SIZES, 3: (4, 3, 4, 8), 4: (4, 3, 16, 8)})
    monkeypatch.setattr(lbt_step, "peak", lambda method, size, smallest: (peaks[method.name], ""))
    monkeypatch.setattr(lbt_step, "available", lambda: 10240.0)
    text = lbt_step.run("lbt", 4, methods, quick=False).text
    assert rows(text, "mlo, plain supernet") == [[" - [1] ", " "]]
    assert "1. mlo, plain supernet: left out: 12 GiB to be expected, from 3.0 with 4 images; 10 GiB available" in text
    assert [cells[1] for cells in rows(text, "mlo |")] == [" 1.00 (1.00 to 1.00) "]
    assert "MiB, beside the networks: mlo 2048." in text
    monkeypatch.setattr(lbt_step, "available", lambda: 1024.0)
    text = lbt_step.run("lbt", 4, methods, quick=False).text  # nor does what the others are compared with
    assert len([line for line in text.splitlines() if "GiB to be expected" in line]) == 2


def test_unrolling_measures_time_and_memory():
    methods = {m.name: m for m in unrolling.METHODS}
    assert unrolling.check([methods["TorchOpt MetaSGD"], methods["mlo Unroll(checkpoint=True)"]], 5) < 1e-9
    result = unrolling.run([methods["mlo Unroll()"]], quick=True)
    assert result.raw["agreement"] < 1e-9
    assert [one["error"] for one in result.raw["measured"]] == ["", ""]
    assert [one["mebibytes"] is not None for one in result.raw["measured"]] == [False, MEASURABLE]
    assert set(result.figures) == {"unroll-time", "unroll-memory"}


def test_the_same_steps_give_the_same_accuracies():
    methods = [m for m in cleaning.methods_of("cleaning") if m.name in ("mlo Unroll()", "TorchOpt MetaSGD")]
    mlo_curve, torchopt_curve = cleaning.train(methods, seed=0, parts=2, rounds=2)
    assert mlo_curve.accuracies == torchopt_curve.accuracies
    assert 0 < mlo_curve.seconds[0] < mlo_curve.seconds[1]
    text = cleaning.run(methods[:1], quick=True, kind="reweighting").text
    assert "not reached (0 of 2)" in text


def test_seconds_to_a_target():
    curves = [cleaning.Curve("a", seed, [1.0, 2.0], [0.5, end]) for seed, end in enumerate((0.9, 0.7, 0.95))]
    assert [curve.reaches(0.9) for curve in curves] == [2.0, math.inf, 2.0]
    assert cleaning.reach(curves, 0.9) == "2.00 (2 of 3)"
    assert cleaning.reach(curves, 0.5) == "1.00 (1.00 to 1.00)"
    assert cleaning.reach(curves, 0.95) == "not reached (1 of 3)"


def test_another_computation_is_not_compared(monkeypatch):
    wrong = {**overhead.TRAINERS, "mlo Unroll(last=1)": overhead.TRAINERS["mlo FiniteDifference()"]}
    monkeypatch.setattr(overhead, "TRAINERS", wrong)
    with pytest.raises(AssertionError, match=r"mlo Unroll\(last=1\) and by hand, double backward: expected a relative"):
        overhead.check(overhead.METHODS, 3)
    with pytest.raises(AssertionError, match="found nan"):
        agree("it", math.nan, 1.0)


def fails(size):
    raise ValueError("AdamW is not\nsupported")


def killed(size):
    os.kill(os.getpid(), signal.SIGKILL)


def needs(size):
    return lambda num: bytearray(num * size << 20)


def test_methods_take_turns_and_leave_at_the_cap(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr("tests.benchmarks.speed.timing.time.perf_counter", lambda: clock[0])

    def takes(seconds, name):
        def work(num):
            clock[0] += num * seconds
            order.append(name)

        return work

    methods = [
        Method("slow", "", lambda size: takes(float(size), "slow")),
        Method("broken", "", fails),
        Method("fast", "", lambda size: takes(0.5, "fast")),
    ]
    found = measure(methods, (1, 4, 8), repeats=3, num=lambda size: 2, cap=15)
    assert order[:8] == ["slow", "fast"] * 4
    assert [one.method for one in found] == ["slow", "broken", "fast"] * 3
    assert of(found, "slow", 4).seconds == [4.0] * 3
    assert of(found, "slow", 8).error == "left out: more than 15 s to be expected"
    assert of(found, "fast", 8).median == 0.5
    assert of(found, "broken", 1).error == "ValueError: AdamW is not supported"
    assert Measured("a", 1, [2.0, 6.0]).ratios(Measured("b", 1, [1.0, 2.0])) == [2.0, 3.0]


def test_peak_memory_is_that_of_the_work():
    found, error = peak(Method("big", "", needs), 64, 1)
    assert not error
    assert found == (pytest.approx(64, abs=3) if MEASURABLE else None)


def test_a_process_that_is_killed_for_its_memory_is_an_error():
    found, error = peak(Method("killed", "", killed), 64, 1)
    assert found is None
    assert error.startswith("BrokenProcessPool: ") if MEASURABLE else not error  # no process is started there


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("tests.benchmarks.speed.report.version", lambda library: "1" if library == "mlo" else None)
    benchmark = Benchmark("b", "B", partial(cleaning.run, kind="cleaning"), cleaning.methods_of("cleaning"))
    assert benchmark.missing() == ["Betty", "TorchOpt", "higher"]
    assert {m.library for m in benchmark.installed()} == {"", "mlo"}


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm():
    figure = line_chart({"a": [(1.0, 0.0), (2.0, 3.0)]}, "x", "y", logarithmic=(True, True))
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([math.nan, 3.0], nan_ok=True)


def test_what_is_not_measured_again_stays_and_says_what_it_was_measured_on():
    first, second = BENCHMARKS[0].title, BENCHMARKS[1].title
    one = f"CPU; commit 1.\n\n## {first}\n\nA\n\n## {second}\n\nB\n"
    two = merged(f"CPU; commit 2.\n\n## {second}\n\nC\n", one)
    assert two == f"CPU; commit 2.\n\n## {first}\n\nMeasured apart: CPU; commit 1.\n\nA\n\n## {second}\n\nC\n"
    three = merged(f"CPU; commit 3.\n\n## {second}\n\nD\n", two)
    assert three == two.replace("commit 2", "commit 3").replace("C\n", "D\n")
    assert merged(f"CPU; commit 3.\n\n## {first}\n\nE\n", two).count("Measured apart: CPU; commit 2.") == 1
    assert "apart" not in merged(f"CPU; commit 1.\n\n## {second}\n\nC\n", one)
    quick = f"CPU; commit 4.\n\n{QUICK}\n\n## {second}\n\nF\n"
    assert merged(quick, one) == quick


def test_output_fills_the_marked_part(tmp_path, capsys, monkeypatch):
    path = tmp_path / "speed.md"
    path.write_text(f"# Speed\n\nbefore\n\n{BEGIN}\n{END}\n\nafter\n")
    figure = line_chart({"a": [(1.0, 2.0), (2.0, 3.0)]}, "x", "y", logarithmic=(True, True))
    write(tmp_path, "HERE\n\n## One\n\nTEXT", {"n": 1}, {"b": overhead.Result("", None, {"picture": figure})})
    write(tmp_path, "HERE\n\n## One\n\nNEWER\n", {"n": 2}, {})
    assert path.read_text() == f"# Speed\n\nbefore\n\n{BEGIN}\n\nHERE\n\n## One\n\nNEWER\n\n{END}\n\nafter\n"
    assert json.loads((tmp_path / "speed.json").read_text()) == {"n": 2}
    assert (tmp_path / "images" / "speed-picture.png").stat().st_size > 1000
    result = overhead.Result("TABLE", [1])
    monkeypatch.setattr(
        "tests.benchmarks.speed.__main__.BENCHMARKS", (Benchmark("b", "Title", lambda methods, quick: result, ()),)
    )
    main(["--only", "b", "--output", str(tmp_path / "new")])
    assert "## Title" in capsys.readouterr().out
    assert "TABLE" in (tmp_path / "new" / "speed.md").read_text()
