"""2,000 fuzz cases per run, always the same ones; `python -m tests.tools.fuzz --cases N --seed S` looks elsewhere."""

import pytest

from tests.tools.fuzz import DTYPES, run_campaign

CASES = 2000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_finite_but_wrong_result(dtype):
    counts = {"compared": 0, "edge": 0}
    cases = CASES // len(DTYPES)
    run_campaign(dtype, cases, seed=None, counts=counts)
    assert counts["compared"] >= 0.97 * cases, f"{counts['edge']} of {cases} cases said nothing"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_campaign(seed):
    for dtype in DTYPES:
        run_campaign(dtype, 2500, seed=seed, counts={"compared": 0, "edge": 0})
