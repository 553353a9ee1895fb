"""The matrix's table: rows of cells that run again take the place of theirs, and the sums are of all rows."""

from collections import Counter

from tests.chaos.engine import Outcome, Pace
from tests.chaos.matrix import whole
from tests.chaos.report import table

PACE = Pace(calm_s=1.0, fault_s=6.0, rate_per_s=50, timeout_ms=1000)


def test_cells_that_run_again_replace_their_rows() -> None:
    """The others keep theirs, in the matrix's order; what went wrong counts until it goes well."""
    first, second, third = list(whole())[:3]
    wrong = Outcome(second, searches=1200, flags=Counter({"none": 7}), complaints=["a | b"])
    before = table([Outcome(third, searches=30, back_s=0.25), wrong, Outcome(first, searches=20)], PACE)
    assert before.startswith(
        "2 of 3 cells as they must be; 1,250 searches under a fault, 50 a second, `timeout_ms` 1000."
    )
    assert "| none 7 | 0.00 | 0 | 0 | 0 | never | a / b |" in before
    after = table([Outcome(second, searches=40, back_s=1.0)], PACE, f"\n{before}\n")
    assert after.startswith("3 of 3 cells as they must be; 90 searches")
    rows, old = after.splitlines()[4:], before.splitlines()[4:]
    assert [rows[0], rows[2]] == [old[0], old[2]]
    assert rows[1].endswith("| 1.0 | ok |")
