"""What the methods declare is what the command line and the documentation say."""
from pathlib import Path

from nnunet_transplant.merging import markdown_table

DOCUMENTATION = Path(__file__).parents[2] / "documentation" / "methods.md"


def test_the_documentation_lists_the_methods_as_they_are() -> None:
    assert markdown_table() in DOCUMENTATION.read_text(), "paste the output of markdown_table() into methods.md"
