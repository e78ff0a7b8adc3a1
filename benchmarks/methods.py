"""Every merging method with its default parameters on the same models, and their scores: a part of hippocampus.py and
brain.py."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from steps import Steps

from nnunet_transplant.methods import METHODS
from nnunet_transplant.recipe import Recipe

N_CASES = 8  # volumes that steps may look at: training cases of the tasks, not the test cases
# averages of aligned models, by what the tables call them
ALIGNED = {"rebasin": Recipe(align="rebasin"), "activation_align": Recipe(align="activation"),
           "mudsc_align": Recipe(align="mudsc"), "zipit": Recipe(align="activation", parameters={"units": "zip"}),
           "weight_zip": Recipe(align="rebasin", parameters={"units": "zip"}),
           "mudsc_zip": Recipe(align="mudsc", parameters={"units": "zip"})}
EVERY = {**{name: Recipe(name) for name in METHODS}, **ALIGNED}


def flags(recipe: Recipe) -> str:
    """Its steps and their options, as a user types them."""
    steps = ({} if recipe.align is None else {"align": recipe.align}) | {"method": recipe.method}
    return " ".join(f"-{name} {value}" for name, value in (steps | dict(recipe.parameters)).items())


def merge_and_score(run: Steps, experts: Sequence[Path], others: Mapping[str, Path], dataset: int, fold: int,
                    device: str) -> None:
    """Merge the experts' fold by every method that takes so many models, and by every aligner, score the merged models
    and the others on the fold's validation cases of the dataset, and print the mean Dice of each structure."""
    models = " ".join(map(str, experts))
    merged = {}
    for name, recipe in EVERY.items():
        if recipe.merging.max_models is not None and len(experts) > recipe.merging.max_models:
            continue
        merged[name] = run.work / "methods" / name
        command = f"nnunet_transplant_merge -m {models} -f {fold} -o {merged[name]} {flags(recipe)}"
        if recipe.looking:
            command += f" -d {dataset} -cases train:{fold} -n_cases {N_CASES} -n_patches 1000 -device {device}"
        run(merged[name], command)
    tables = []
    for name, model in {**others, **merged}.items():  # one by one: an interrupted run goes on
        output = run.work / "scores" / name
        run(output, f"nnunet_transplant_evaluate -m {model} -d {dataset} -f {fold} -o {output} -device {device}")
        tables.append(pd.read_csv(output / "evaluation.csv").assign(model=name))
    table = pd.concat(tables).pivot_table(index="model", columns="structure", values="dice", sort=False)
    print(table.assign(mean=table.mean(axis=1, skipna=False)).round(3).to_string())
