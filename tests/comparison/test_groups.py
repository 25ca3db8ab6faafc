"""Which runs are found, and which stand in one row."""

import pytest

import mlo
from mlo.comparison import find_runs, group_runs

from .made_runs import make_run, make_sweep

DONE = {"test_error": 3.0}


def groups_of(tmp_path, *settings, group_by=()):
    for index, one in enumerate(settings):
        make_run(tmp_path / str(index), seed=index, settings=one, result=DONE)
    return group_runs(find_runs([tmp_path]), group_by)


def labels(groups):
    return [(group.label, [run.seed for run in group.finished]) for group in groups]


def test_runs_are_found_at_any_depth_and_each_once(tmp_path):
    make_sweep(tmp_path / "a" / "b", values=(0.5, 1.0), num_seeds=2)
    make_run(tmp_path / "a" / "b" / "lambda=1" / "seed=0" / "inside", result=DONE)  # of the run, whatever it is
    found = find_runs([tmp_path, tmp_path / "a", tmp_path / "a" / "b" / "lambda=1" / "seed=0"])
    assert len(found) == 4
    assert find_runs([tmp_path / "a" / "b" / "lambda=1" / "seed=0"])[0].settings["lambda"] == 1.0


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(mlo.MloError, match=r"found no recipe.yaml in it at any depth"):
        find_runs([tmp_path])


@pytest.mark.parametrize("text", ["", "{", '{"test_error": 3', "\x00"])
def test_a_damaged_result_is_named_with_the_way_out(tmp_path, text):
    folder = make_run(tmp_path / "run", result=DONE)
    (folder / "result.json").write_text(text)
    with pytest.raises(mlo.MloError, match=r"result.json: expected JSON; found .*remove it, and mlo resume .*run"):
        find_runs([tmp_path])


def test_a_result_that_is_no_mapping_and_bytes_that_are_no_text(tmp_path):
    folder = make_run(tmp_path / "run", result=DONE)
    (folder / "result.json").write_text("[3.0]")
    with pytest.raises(mlo.MloError, match="expected a mapping of figures"):
        find_runs([tmp_path])
    (folder / "result.json").write_bytes(b"\xff\xfe")
    with pytest.raises(mlo.MloError, match="expected JSON"):
        find_runs([tmp_path])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3.1", True, None, [3.1]])
def test_a_figure_that_is_no_number_is_an_error(tmp_path, value):
    make_run(tmp_path / "run", result={"test_error": value})
    (run,) = find_runs([tmp_path])
    with pytest.raises(mlo.MloError, match=r"result.json: test_error: expected a finite number"):
        run.figure("test_error")


def test_unfinished_runs_say_where_they_are(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1, metrics='{"phase": "search", "round": 1}\n{"phase": "search", "round": 2}\n{"pha')
    (group,) = group_runs(find_runs([tmp_path]))
    assert [run.state for run in group.unfinished] == ["not begun", "search, round 2"]
    assert group.finished == ()


def test_runs_that_differ_in_seed_and_place_only_are_one_group(tmp_path):
    (group,) = groups_of(tmp_path, {"device": "cpu"}, {"device": "cuda:1", "threads": 4}, {"description": "x"})
    assert (group.recipe, group.label, group.num_seeds) == ("lbt/digits", "", 3)


def test_differing_settings_make_groups_with_numbers_by_size(tmp_path):
    found = groups_of(tmp_path, {"lambda": 10.0}, {"lambda": 9.0}, {"lambda": 10}, {"lambda": 0.5})
    assert labels(found) == [("lambda=0.5", [3]), ("lambda=9", [1]), ("lambda=10", [0, 2])]


def test_settings_within_mappings_and_lists(tmp_path):
    found = groups_of(
        tmp_path,
        {"data": {"fractions": [0.5, 0.5]}, "levels": {"t": {"steps": 1}}},
        {"data": {"fractions": [0.2, 0.8]}, "levels": {"t": {"steps": 1}}},
    )
    assert labels(found) == [("data.fractions=[0.2, 0.8]", [1]), ("data.fractions=[0.5, 0.5]", [0])]


def test_another_kind_is_one_difference(tmp_path):
    unroll = {"h": {"kind": "unroll", "last": None}}
    found = groups_of(
        tmp_path,
        unroll,
        {"h": {"kind": "finite_difference", "radius": 0.01, "last": 1}},
        {"h": {"kind": "finite_difference", "radius": 0.1, "last": 1}},
    )
    assert labels(found) == [
        ("h.kind=finite_difference, h.radius=0.01", [1]),
        ("h.kind=finite_difference, h.radius=0.1", [2]),
        ("h.kind=unroll", [0]),
    ]


def test_a_setting_that_older_runs_do_not_have_is_a_difference(tmp_path):
    assert labels(groups_of(tmp_path, {}, {"new": True})) == [("", [0]), ("new=true", [1])]


def test_recipes_differ_among_themselves_only(tmp_path):
    make_run(tmp_path / "a", "lbt/one", settings={"lambda": 1.0}, result=DONE)
    make_run(tmp_path / "b", "lbt/two", settings={"lambda": 2.0}, result=DONE)
    assert [(group.recipe, group.label) for group in group_runs(find_runs([tmp_path]))] == [
        ("lbt/one", ""), ("lbt/two", ""),
    ]  # fmt: skip


def test_group_by_pools_the_rest(tmp_path):
    found = groups_of(
        tmp_path, {"lambda": 1.0, "gamma": 1.0}, {"lambda": 1.0, "gamma": 2.0}, {"lambda": 2.0}, group_by=["lambda"]
    )
    assert labels(found) == [("lambda=1", [0, 1]), ("lambda=2", [2])]


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(mlo.MloError, match=r"--group-by lambd: .*did you mean 'lambda'"):
        groups_of(tmp_path, {}, group_by=["lambd"])


def test_a_seed_that_was_run_twice_counts_once(tmp_path):
    for name, seed, error in (("a", 0, 2.0), ("b", 0, 4.0), ("c", 1, 5.0)):
        make_run(tmp_path / name, seed=seed, result={"test_error": error})
    (group,) = group_runs(find_runs([tmp_path]))
    assert group.figures("test_error") == {0: 3.0, 1: 5.0}
    assert group.num_seeds == 2


def test_a_setting_may_have_settings_inside(tmp_path):
    """Two found cells are two groups, beside a published one."""
    cells = [{"genotype": {"normal": [["skip", 0]]}}, {"genotype": {"normal": [["skip", 1]]}}, {"genotype": "NASNet"}]
    found = groups_of(tmp_path, *cells, {"genotype": {"normal": [["skip", 0]]}}, group_by=("genotype",))
    by_label = dict(labels(found))
    assert sorted(by_label.values()) == [[0, 3], [1], [2]]
    assert by_label["genotype=NASNet"] == [2]
    assert all(label.startswith("genotype=#") for label in by_label if "NASNet" not in label)


def test_metrics_of_another_kind_do_not_end_a_report(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"a": 1}\n')
    assert find_runs([tmp_path])[0].state == "not begun"
