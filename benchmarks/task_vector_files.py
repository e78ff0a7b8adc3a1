"""What a smaller task vector file costs: a part of hippocampus.py."""
from pathlib import Path

import pandas as pd
from steps import Steps

CHOICES = (("float32", 1.0), ("float16", 1.0), ("bfloat16", 1.0), ("float16", 0.5), ("float16", 0.2), ("float16", 0.1))


def size_and_dice(run: Steps, expert: Path, base: Path, dataset: int, fold: int, device: str) -> None:
    """Extract an expert's task vector in every type and density, add it to its base again, and score the result."""
    rows = []
    for dtype, density in CHOICES:
        name = f"{dtype}_{density:g}"
        file, model, output = (run.work / "vectors" / f"{name}{end}" for end in (".safetensors", "", "_score"))
        run(file, f"nnunet_transplant_extract -m {expert} -f {fold} -o {file} -dtype {dtype} -density {density}")
        run(model, f"nnunet_transplant_merge -m {file} -base {base} -o {model}")
        run(output, f"nnunet_transplant_evaluate -m {model} -d {dataset} -f {fold} -o {output} -device {device}")
        dice = pd.read_csv(output / "evaluation.csv")["dice"].mean()
        rows.append({"dtype": dtype, "density": density, "MB": file.stat().st_size / 1e6, "Dice": dice})
    print(pd.DataFrame(rows).round(4).to_string(index=False))
