"""Brain volumes in MR contrast from anatomical label maps, as a dataset in nnU-Net's raw format: real anatomy, computed
images, any contrast.

    python benchmarks/render_brains.py LABEL_MAPS OUTPUT/Dataset201_BrainT1 -contrast t1 -subjects 1-10 -renders 4

LABEL_MAPS: the training label maps of SynthSeg (Billot et al., Medical Image Analysis 2023; Apache-2.0), whole heads in
FreeSurfer's numbers, https://github.com/BBillot/SynthSeg, data/training_label_maps. A subject is the position of its
file by name. Images are made as SynthSeg makes them: the label map is moved and bent, every label gets a Gaussian of
grey values, then come blur, a bias field, gamma and noise. The same arguments give the same images.
"""
import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from scipy.spatial.transform import Rotation

STRUCTURES = {  # name: FreeSurfer's numbers, left and right
    "WhiteMatter": [2, 41], "Cortex": [3, 42], "LateralVentricle": [4, 5, 43, 44], "Thalamus": [10, 49],
    "Caudate": [11, 50], "Putamen": [12, 51], "Pallidum": [13, 52], "Hippocampus": [17, 53], "Amygdala": [18, 54],
    "Brainstem": [16], "Cerebellum": [7, 8, 46, 47]}
GREY = {  # mean grey values of a tissue in each contrast: (t1, t2), and the labels that consist of it
    (190, 90): [2, 41, 7, 46, 28, 60, 16, 85],               # white matter
    (125, 140): [3, 42, 8, 47, 17, 53, 18, 54],              # cortex
    (145, 115): [10, 49, 11, 50, 12, 51, 26, 58],            # deep grey matter
    (175, 75): [13, 52],                                     # pallidum
    (45, 230): [4, 5, 14, 15, 24, 43, 44]}                   # fluid
CONTRASTS = ("t1", "t2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("label_maps", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("-contrast", choices=CONTRASTS, required=True)
    parser.add_argument("-subjects", required=True, help="as 1-10")
    parser.add_argument("-renders", type=int, default=4, help="of each subject")
    parser.add_argument("-spacing", type=float, default=4.0, help="mm")
    args = parser.parse_args()
    first, _, last = args.subjects.partition("-")
    files = sorted(args.label_maps.glob("*.nii.gz"))
    value_of = np.zeros(1 << 15, np.uint8)
    for value, numbers in enumerate(STRUCTURES.values(), start=1):
        value_of[numbers] = value
    for folder in ("imagesTr", "labelsTr"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    count = 0
    for subject in range(int(first), int(last or first) + 1):
        labels, spacing = read(files[subject - 1])
        for render in range(args.renders):
            rng = np.random.default_rng([subject, render, CONTRASTS.index(args.contrast)])
            bent = bend(labels, args.spacing / spacing, spacing, rng)
            name = f"brain_{subject:02d}_{render:02d}"
            write(image_of(bent, args.contrast, rng), args.spacing, args.output / "imagesTr" / f"{name}_0000.nii.gz")
            write(value_of[bent], args.spacing, args.output / "labelsTr" / f"{name}.nii.gz")
            count += 1
    names = {"background": 0, **{name: value for value, name in enumerate(STRUCTURES, start=1)}}
    (args.output / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "MRI"}, "labels": names, "numTraining": count, "file_ending": ".nii.gz"}, indent=1))


def read(file: Path) -> tuple[np.ndarray, float]:
    """A label map (z, y, x), and its voxel size in mm, which is the same along all axes."""
    image = SimpleITK.ReadImage(str(file))
    return SimpleITK.GetArrayFromImage(image).astype(np.int16), float(image.GetSpacing()[0])


def write(array: np.ndarray, spacing: float, file: Path) -> None:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([spacing] * 3)
    SimpleITK.WriteImage(image, str(file))


def bend(labels: np.ndarray, step: float, spacing: float, rng: np.random.Generator) -> np.ndarray:
    """The label map turned by up to 9 degrees, scaled by up to 10 %, bent by some 5 mm, and sampled every `step`
    voxels."""
    shape = np.array(labels.shape)
    size = np.ceil(shape / step).astype(int)
    grid = np.stack(np.meshgrid(*[np.arange(n) * step for n in size], indexing="ij"))
    centre = ((shape - 1) / 2).reshape(3, 1, 1, 1)
    turned = Rotation.from_euler("xyz", rng.uniform(-9, 9, 3), degrees=True).as_matrix() / rng.uniform(0.9, 1.1, 3)
    places = np.tensordot(turned, grid - centre, axes=1) + centre
    places += np.stack([smooth_field(size, 5, rng) for _ in range(3)]) * 5 / spacing
    return map_coordinates(labels, places, order=0)


def smooth_field(size: np.ndarray, knots: int, rng: np.random.Generator) -> np.ndarray:
    """Standard normal numbers on a coarse grid, and between them a cubic spline."""
    return zoom(rng.normal(size=(knots, knots, knots)), size / knots, order=3, grid_mode=True, mode="nearest")


def image_of(labels: np.ndarray, contrast: str, rng: np.random.Generator) -> np.ndarray:
    """A float32 image, background near 0, the brightest tissue near 255."""
    means = grey_values(labels, contrast, rng)
    present = np.unique(labels)
    mean = np.array([means[label] for label in present])
    spread = np.where(present == 0, 0, rng.uniform(4, 12, len(present)))
    where = np.searchsorted(present, labels)
    image = gaussian_filter(rng.normal(mean[where], spread[where]), rng.uniform(0.3, 0.6))
    image *= np.exp(0.15 * smooth_field(np.array(labels.shape), 4, rng))
    image = 255 * np.clip(image / 255, 0, None) ** np.exp(0.1 * rng.normal())
    return (image + rng.normal(0, rng.uniform(1, 5), image.shape)).astype(np.float32)


def grey_values(labels: np.ndarray, contrast: str, rng: np.random.Generator) -> Mapping[int, float]:
    """The mean of each label: that of its tissue, a bit other in each image; of what is no tissue of the brain, any."""
    means = {int(label): rng.uniform(20, 160) for label in np.unique(labels)}
    for both, members in GREY.items():
        tissue = both[CONTRASTS.index(contrast)] + 6 * rng.normal()
        means |= {label: tissue + 4 * rng.normal() for label in members}
    return means | {0: 0.0}


if __name__ == "__main__":
    main()
