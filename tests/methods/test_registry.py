"""What the steps declare is what the command line and the documentation say."""
import re
from pathlib import Path

import pytest
import torch
from factory import base_network, write_model

from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.fitting import FITS
from nnunet_transplant.methods import METHODS, table
from nnunet_transplant.methods.registry import CONVEX, FREE_MEAN, FREE_SUM, RATIOS, SUM_TO_ONE, Method, method
from nnunet_transplant.methods.table import markdown_table
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.steps import Step
from nnunet_transplant.vectors import Tensors

DOCUMENTATION = Path(__file__).parents[2] / "documentation" / "reference" / "methods.md"
STEPS = [*ALIGNERS.values(), *METHODS.values(), *FITS.values()]


def test_the_documentation_lists_the_steps_as_they_are() -> None:
    listed = DOCUMENTATION.read_text().partition(f"<!-- made by python -m {table.__name__} -->\n\n")[2]
    assert listed.partition("\n\n<!-- until here -->")[0] == markdown_table(), "paste markdown_table() into methods.md"


def test_the_tables_have_a_row_for_each_step_with_all_that_it_declares() -> None:
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in markdown_table().splitlines()
            if line.startswith("| `") and not line.startswith("| `-")]
    assert [row[0].strip("`") for row in rows] == [step.name for step in STEPS]
    for row, step in zip(rows, STEPS, strict=True):
        _, summary, needs, *weights, options, source = row
        assert summary == step.summary and source == f"[{step.reference}]({step.url})"
        assert ("the base" in needs) == ("base" in step.needs)
        assert ("unlabelled volumes" in needs) == ("volumes" in step.needs)
        assert bool(re.search(r"\blabelled volumes", needs)) == ("labels" in step.needs)
        assert weights == ([step.weights_rule.text] if isinstance(step, Method) else [])
        said = re.findall(r"`-(\w+)` (\S+) \(([^)]*)\): ", options)
        assert [name for name, _, _ in said] == [parameter.name for parameter in step.parameters]
        for (_, default, allowed), parameter in zip(said, step.parameters, strict=True):
            assert parameter.check(default) == parameter.default and parameter.help in options
            for end in re.split(r" to |, ", allowed):  # both ends, or every choice
                assert parameter.check(end) == parameter.kind(end)
    assert sum("at most 2 models" in row[2] for row in rows) == 1


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_declares_itself(step: Step) -> None:
    assert step.summary and step.reference and step.url.startswith("https://")
    for parameter in step.parameters:
        assert parameter.help and parameter.check(parameter.default) == parameter.default


def test_names_are_of_one_step_only() -> None:
    """A recipe gives an option to one step by its name."""
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)


def test_a_function_becomes_a_method_and_stays_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_steps", dict(METHODS))

    def first(tensors: Tensors) -> object:
        return tensors.thetas[0]
    declared = method("first", "the first of them", reference="nobody", url="https://example.org", weights=RATIOS,
                      needs=("base", "labels"), by_entry=True, max_models=3)(first)
    assert declared is first
    found = METHODS.find("first")
    assert (found.function, found.inputs, found.parameters) == (first, ("tensors",), ())
    assert (found.needs, found.needs_base, found.looks) == (("base", "labels"), True, True)
    assert (found.weights_rule, found.by_entry, found.max_models) == (RATIOS, True, 3)


def test_the_documentations_own_method_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_steps", dict(METHODS))
    monkeypatch.chdir(tmp_path)
    base = base_network()
    for seed, name in enumerate(("TASK_901", "TASK_902")):
        write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=seed)
    example = DOCUMENTATION.read_text().partition("## A step of your own")[2].partition("```python\n")[2]
    exec(compile(example.partition("```")[0], "methods.md", "exec", dont_inherit=True), {})
    tasks, merged = ([open_models(name)[0] for name in names] for names in (("TASK_901", "TASK_902"), ("MERGED",)))
    theta_0 = tasks[0].theta_0()
    for name, tensor in theta_0.items():
        lower = torch.minimum(*(task.tensors()[name] - tensor for task in tasks))  # torch's median of two
        torch.testing.assert_close(merged[0].tensors()[name], tensor + 0.7 * lower)


def test_every_rule_of_weights_is_used_and_says_another_thing() -> None:
    rules = (SUM_TO_ONE, CONVEX, RATIOS, FREE_MEAN, FREE_SUM)
    assert len({rule.text for rule in rules}) == len(rules)
    assert {found.weights_rule.text for found in METHODS.values()} >= {rule.text for rule in rules}
