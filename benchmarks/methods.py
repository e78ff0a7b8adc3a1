"""Every merging method with its default parameters on the same models, and their scores: a part of hippocampus.py and
brain.py."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from steps import Steps

from nnunet_transplant.merging import METHODS

N_CASES = 8  # volumes that methods with data look at: training cases of the tasks, not the test cases


def merge_and_score(run: Steps, experts: Sequence[Path], others: Mapping[str, Path], dataset: int, fold: int,
                    device: str) -> None:
    """Merge the experts' fold by every method that takes so many models, score the merged models and the others on the
    fold's validation cases of the dataset, and print the mean Dice of each structure."""
    models = " ".join(map(str, experts))
    merged = {}
    for method in METHODS.values():
        if method.max_models is not None and len(experts) > method.max_models:
            continue
        merged[method.name] = run.work / "methods" / method.name
        command = f"nnunet_transplant_merge -m {models} -f {fold} -o {merged[method.name]} -method {method.name}"
        if method.needs_data:
            command += f" -d {dataset} -cases train:{fold} -n_cases {N_CASES} -data_device {device}"
        run(merged[method.name], command)
    tables = []
    for name, model in {**others, **merged}.items():  # one by one: an interrupted run goes on
        output = run.work / "scores" / name
        run(output, f"nnunet_transplant_evaluate -m {model} -d {dataset} -f {fold} -o {output} -device {device}")
        tables.append(pd.read_csv(output / "evaluation.csv").assign(model=name))
    table = pd.concat(tables).pivot_table(index="model", columns="structure", values="dice", sort=False)
    print(table.assign(mean=table.mean(axis=1, skipna=False)).round(3).to_string())
