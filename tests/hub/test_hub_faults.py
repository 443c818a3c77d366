"""A part of `make faults`, which see: pushes and pulls with a fault in the way end as they must."""

import pytest
from hub_client import connected
from hub_faults import all_cases, quick_cases, run_cases


@pytest.mark.parametrize(
    ("cases", "count"), [(quick_cases, 48), pytest.param(all_cases, 222, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_fault_ends_in_one_right_commit_or_copy_or_in_one_clear_line(saved_run, tmp_path, cases, count):
    with connected(tmp_path / "home") as hub:
        outcomes = run_cases(cases(), hub, saved_run, tmp_path)

    assert len(outcomes) == count
    assert {str(case): outcome for case, outcome in outcomes.items() if outcome} == {}
