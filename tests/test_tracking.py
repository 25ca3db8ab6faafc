"""The progress bar."""

import os

from mlo.tracking import ProgressBar, RoundReport

METRICS = {
    f"{level}.{name}": value
    for level, loss in (("teacher", 2.28), ("student", 1.01), ("architecture", 4.61))
    for name, value in (("loss", loss), ("accuracy", 0.12), ("learning_rate", 0.1))
}


def test_everything_is_shown_on_a_narrow_terminal_too(monkeypatch, capsys):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    with ProgressBar("search", 11, 40) as bar:
        bar.on_round(RoundReport(12, 40, METRICS))
    shown = capsys.readouterr().err.strip().rpartition("\r")[2]
    assert len(shown) <= 80
    assert shown.startswith("search: 12/40 <")
    assert shown.endswith("teacher 2.28 12%, student 1.01 12%, architecture 4.61 12%")
