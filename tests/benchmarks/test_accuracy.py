"""The accuracy table can be printed, whichever of the other libraries are installed."""

from .accuracy import OWN, report
from .cases import CASES, Method


def test_report():
    def refuse(case):
        raise ValueError("AdamW is not supported.\nSorry")

    peer = Method("Peer", "`f`", refuse, True, True, "as documented")
    text = report([*OWN, peer], CASES[:1])
    assert "mlo 0." in text
    assert "torch" in text
    row = next(line for line in text.splitlines() if line.startswith("| mlo `Unroll()`"))
    assert float(row.split("|")[2]) < 1e-12
    assert "| Peer `f` [1] | cannot [2] |" in text
    assert text.rstrip().splitlines()[-1].startswith("2. Peer: `ValueError: AdamW is not supported")
