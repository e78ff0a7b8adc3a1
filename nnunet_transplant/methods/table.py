"""The steps as documentation/reference/methods.md lists them: `python -m nnunet_transplant.methods.table`."""
from collections.abc import Iterable, Sequence

from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.fitting import FITS
from nnunet_transplant.methods import METHODS, Method
from nnunet_transplant.methods.registry import needs_in_words
from nnunet_transplant.steps import Parameter, Step


def markdown_table() -> str:
    """A table of the aligners, one of the methods and one of the fits, from what they declare."""
    return "\n\n".join([_table("-align", "matches units", ALIGNERS.values()),
                        _table("-method", "what it does", METHODS.values()),
                        _table("-fit", "what it fits", FITS.values())])


def _table(flag: str, does: str, steps: Iterable[Step]) -> str:
    rows = [[f"`{step.name}`", step.summary, _needs(step), *_weights(step), "<br>".join(map(_option, step.parameters)),
             f"[{step.reference}]({step.url})"] for step in steps]
    columns = [f"`{flag}`", does, "needs", "options", "source"]
    if len(rows[0]) > len(columns):
        columns.insert(3, "weights")
    return "\n".join(map(_row, [columns, ["---"] * len(columns), *rows]))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _needs(step: Step) -> str:
    most = step.max_models if isinstance(step, Method) else None
    return ", ".join([*filter(None, [needs_in_words(step)]), *([] if most is None else [f"at most {most} models"])])


def _weights(step: Step) -> list[str]:
    return [step.weights_rule.text] if isinstance(step, Method) else []


def _option(option: Parameter) -> str:
    default = f"{option.default:g}" if isinstance(option.default, float) else option.default
    return f"`-{option.name}` {default} ({option.allowed.replace('|', ', ')}): {option.help}"


if __name__ == "__main__":
    print(markdown_table())
