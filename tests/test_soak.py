"""A run of two processes that is killed five times ends as if it never was."""

import pytest
from soak import soak


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['use_zero1', 'use_fsdp'])
def test_five_kills_leave_no_trace(strategy, tmp_path):
    kills, _ = soak(5, seed=7, strategy={strategy: True}, folder=tmp_path)
    assert kills == 5
