"""What looking at volumes costs, in words; the rest is in test_merger.py."""
import pytest

from nnunet_transplant.cost import in_words


@pytest.mark.parametrize(("seconds", "words"), [(21.4, "21 seconds"), (100, "2 minutes"), (3000, "50 minutes"),
                                                (7200, "2.0 hours")])
def test_durations_are_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
