"""A few seconds of mutated images."""

import pytest
from tests.fuzz.fuzz_images import fuzz


@pytest.mark.filterwarnings("ignore")
def test_mutated_images_are_opened_or_refused_in_one_sentence():
    outcomes = fuzz(3)
    assert min(outcomes["opened"], outcomes["refused"]) > 20
