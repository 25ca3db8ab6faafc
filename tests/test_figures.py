import matplotlib as mpl
import pytest
from matplotlib.transforms import Bbox

from mlo.errors import MloError
from mlo.figures import add_box, add_curve, inch_figure, save_figure, text_width, write
from tests.pictures import (
    assert_is_drawn,
    curves,
    is_crossed,
    outside,
    overlapping,
    rounded_boxes,
    svg_texts,
    text_boxes,
)


def picture():
    figure, axes = inch_figure(3.0, 2.0)
    add_box(axes, (1.0, 1.0), (1.0, 0.5), fill="white", line="black")
    add_curve(axes, [(1.5, 1.0), (2.0, 1.0), (2.0, 1.8), (2.5, 1.8)], "red", head=True, dashed=True)
    write(axes, (1.0, 1.0), "costs $5 & $6 <b>", size=8.0)
    return figure


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_picture_has_the_same_bytes_whatever_the_date_and_the_users_settings(tmp_path, monkeypatch, suffix):
    save_figure(picture(), tmp_path / f"one{suffix}")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    with mpl.rc_context({"font.size": 30.0, "svg.hashsalt": None, "svg.fonttype": "path", "savefig.dpi": 30.0}):
        before = dict(mpl.rcParams)
        save_figure(picture(), tmp_path / f"two{suffix}")
        assert dict(mpl.rcParams) == before
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_text_is_written_as_it_stands(tmp_path):
    save_figure(picture(), tmp_path / "a.svg")
    assert svg_texts(tmp_path / "a.svg") == ["costs $5 & $6 <b>"]
    save_figure(picture(), tmp_path / "a.png")
    assert_is_drawn(tmp_path / "a.png")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(MloError, match=r"end in one of \.png, \.svg, \.pdf. Got .*a\.gif"):
        save_figure(picture(), tmp_path / "a.gif")


def test_text_is_measured_as_it_is_drawn():
    figure, axes = inch_figure(5.0, 1.0)
    write(axes, (2.5, 0.5), "sep_conv_3x3 $x$", size=12.0, weight="bold")
    ((_, box),) = text_boxes(figure)
    assert text_width("sep_conv_3x3 $x$", 12.0, "bold") == pytest.approx(box.width, rel=0.05)
    assert (box.x0 + box.x1) / 2 == pytest.approx(2.5, abs=0.02)


def test_the_checks_of_pictures_can_fail():
    figure = picture()
    (box,) = rounded_boxes(figure)
    assert box.bounds == pytest.approx((0.5, 0.75, 1.0, 0.5))
    (curve,) = curves(figure)
    assert not is_crossed(box, curve)
    assert is_crossed(Bbox.from_bounds(1.9, 1.2, 0.2, 0.4), curve)
    assert not overlapping(text_boxes(figure))
    write(figure.axes[0], (1.2, 1.05), "on top", size=8.0)
    assert overlapping(text_boxes(figure)) == [("costs $5 & $6 <b>", "on top")]
    write(figure.axes[0], (2.9, 0.2), "beyond the border", size=8.0)
    assert outside(figure, text_boxes(figure)) == ["beyond the border"]
