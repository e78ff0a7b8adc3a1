"""An abdomen CT that is computed, not stored: the data of the demo and of the tests.

A case is a few implicit shapes in millimetres, seen through a random pose and a smooth random deformation, then painted
with Hounsfield units, blurred and made noisy as by one of two scanners. Axes are (z, y, x) as nnU-Net reads them: z
towards the head, y towards the back, x towards the patient's left.
"""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from nnunet_transplant.errors import TransplantError

ORGANS = {"Liver": 1, "Spleen": 2, "Kidney": 3, "Aorta": 4}
SHAPE = (32, 40, 48)  # voxels of 7.5 mm: few enough to learn from on a CPU
FIELD_OF_VIEW = (240.0, 300.0, 360.0)  # mm, whatever the shape: more voxels are smaller voxels

_REGIONS = {"background": 0, "AllOrgans": [1, 2, 3, 4], "SolidOrgans": [1, 2, 3], "Spleen": 2, "Kidney": 3}
_IGNORE = {"ignore": len(ORGANS) + 1}
# nnU-Net writes the regions one after the other, each over the last: in this order all four organs come back.
_REGIONS_ORDER = [ORGANS["Aorta"], ORGANS["Liver"], ORGANS["Spleen"], ORGANS["Kidney"]]
LABEL_KINDS: dict[str, dict] = {
    "plain": {"labels": {"background": 0, **ORGANS}},
    "ignore": {"labels": {"background": 0, **ORGANS, **_IGNORE}},
    "regions": {"labels": _REGIONS, "regions_class_order": _REGIONS_ORDER},
    "regions_ignore": {"labels": {**_REGIONS, **_IGNORE}, "regions_class_order": _REGIONS_ORDER},
}


class Scanner(NamedTuple):
    """What differs between two hospitals: contrast phase, calibration, image quality, and who is scanned."""
    hu: dict[str, float]  # mean HU of what takes up the contrast agent
    gain: float  # shown HU = gain * HU + offset
    offset: float
    noise: float  # HU, standard deviation
    grain: float  # mm, correlation length of the noise
    blur: float  # mm, point spread
    size: float  # mean scale of the patients
    fat: float  # mm, mean thickness of the fat under the skin


SCANNERS = {
    # portal venous phase, a sharp kernel, slim patients
    "A": Scanner({"Liver": 100, "Spleen": 132, "Kidney": 168, "Aorta": 190, "cava": 150},
                 gain=1.0, offset=0, noise=22, grain=2.0, blur=3.0, size=0.97, fat=13),
    # late arterial phase, a smooth kernel, larger patients
    "B": Scanner({"Liver": 80, "Spleen": 124, "Kidney": 180, "Aorta": 240, "cava": 95},
                 gain=1.06, offset=-14, noise=26, grain=4.5, blur=3.8, size=1.0, fat=20),
}


def phantom_case(seed: int, scanner: str, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """One patient on one scanner; the same arguments give the same arrays.

    Returns the image, (z, y, x) int16 in HU, and the labels, (z, y, x) uint8 with the values of ORGANS.
    Raises TransplantError for an unknown scanner, a negative seed, or a shape too coarse for the aorta.
    """
    if scanner not in SCANNERS:
        raise TransplantError(f"unknown phantom scanner {scanner!r}: choose from {', '.join(SCANNERS)}")
    if seed < 0:
        raise TransplantError(f"the seed of a phantom must not be negative: {seed}")
    if len(shape) != 3 or min(shape) < 24:
        raise TransplantError(f"a phantom needs three axes of at least 24 voxels: {tuple(shape)}")
    device = SCANNERS[scanner]
    rng = np.random.default_rng([ord(scanner), seed])
    points = _patient_points(rng, (shape[0], shape[1], shape[2]), device.size)
    hu, labels = _paint(rng, points, device)

    spacing = np.divide(FIELD_OF_VIEW, shape)
    hu += 7 * _smooth_noise(rng, shape, 10.0) * (hu > -200)  # tissue is not uniform, air is
    image = device.gain * gaussian_filter(hu, device.blur / spacing) + device.offset
    image += device.noise * _smooth_noise(rng, shape, device.grain)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16), labels


def write_phantom_dataset(folder: Path, n_cases: int, scanner: str, seed: int, labels: str = "plain",
                          shape: tuple[int, int, int] = SHAPE) -> None:
    """Write cases seed, seed + 1, ... in nnU-Net's raw format, e.g. to nnUNet_raw/Dataset801_PhantomA.

    A case is named after its scanner and its own seed (phantomA_003): equal names are equal cases, and datasets whose
    seeds lie n_cases apart share none. The labels are "plain", "regions" (nested and overlapping: see LABEL_KINDS),
    "ignore" (a quarter of the slices not annotated) or "regions_ignore".
    Raises TransplantError for unknown labels, no cases, a folder that is not empty, and where phantom_case does.
    """
    folder = Path(folder)
    if labels not in LABEL_KINDS:
        raise TransplantError(f"unknown kind of phantom labels {labels!r}: choose from {', '.join(LABEL_KINDS)}")
    if n_cases < 1:
        raise TransplantError(f"a phantom dataset needs at least one case: {n_cases}")
    if folder.exists() and any(folder.iterdir()):
        raise TransplantError(f"the folder for the phantom dataset is not empty: {folder}")
    spacing = np.divide(FIELD_OF_VIEW, shape)[::-1].tolist()  # SimpleITK counts x, y, z
    for case in range(seed, seed + n_cases):
        image, segmentation = phantom_case(case, scanner, shape)
        if "ignore" in LABEL_KINDS[labels]["labels"]:
            unseen = np.random.default_rng(case).permutation(shape[0])[:shape[0] // 4]
            segmentation[unseen] = LABEL_KINDS[labels]["labels"]["ignore"]
        name = f"phantom{scanner}_{case:03d}"
        for array, path in ((image, folder / "imagesTr" / f"{name}_0000.nii.gz"),
                            (segmentation, folder / "labelsTr" / f"{name}.nii.gz")):
            path.parent.mkdir(parents=True, exist_ok=True)
            volume = SimpleITK.GetImageFromArray(array)
            volume.SetSpacing(spacing)
            SimpleITK.WriteImage(volume, path)
    dataset = {"channel_names": {"0": "CT"}, **LABEL_KINDS[labels], "numTraining": n_cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=4) + "\n", encoding="utf-8")


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], length: float) -> np.ndarray:
    """Gaussian noise of unit variance, correlated over length mm; shape (z, y, x)."""
    noise = gaussian_filter(rng.standard_normal(shape), length / np.divide(FIELD_OF_VIEW, shape))
    return noise / noise.std()


def _bend(rng: np.random.Generator, shape: tuple[int, ...], length: float, size: float) -> np.ndarray:
    """A smooth displacement of size mm (standard deviation) along each axis; shape (3, z, y, x)."""
    return size * np.stack([_smooth_noise(rng, shape, length) for _ in range(3)])


def _patient_points(rng: np.random.Generator, shape: tuple[int, int, int], size: float) -> np.ndarray:
    """Where each voxel lies in the average patient, in mm from the middle; shape (3, z, y, x)."""
    axes = [(np.arange(n) - (n - 1) / 2) * extent / n for n, extent in zip(shape, FIELD_OF_VIEW, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")) - rng.normal(0, (8, 3, 5))[:, None, None, None]
    pose = Rotation.from_euler("xyz", np.clip(rng.normal(0, (6, 3, 3)), -10, 10), degrees=True).as_matrix()
    scale = np.clip(rng.normal(size, 0.04), size - 0.08, size + 0.08) * rng.normal(1, 0.02, 3)
    return np.einsum("ij,jzyx->izyx", pose / scale[:, None], grid) + _bend(rng, shape, 60.0, 4.0)


def _ball(points: np.ndarray, centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Inside an ellipsoid, or with two axes (y, x) inside a tube along z; mm; shape (z, y, x)."""
    axes = points[-len(centre):]
    return sum(((p - c) / r) ** 2 for p, c, r in zip(axes, centre, radii, strict=True)) < 1


def _own(rng: np.random.Generator, points: np.ndarray, centre: tuple[float, float, float]) -> np.ndarray:
    """The points as one organ sees them: each organ varies in place, size and form; shape (3, z, y, x)."""
    middle = np.reshape(centre, (3, 1, 1, 1))
    shift = rng.normal(0, (6, 3, 3))[:, None, None, None]
    return middle + (points - middle - shift) / rng.normal(1, 0.06) + _bend(rng, points.shape[1:], 30.0, 4.0)


def _organs(rng: np.random.Generator, points: np.ndarray) -> dict[str, np.ndarray]:
    """The labelled organs as masks of shape (z, y, x), not yet cut to the cavity that holds them."""
    p = _own(rng, points, (30, -5, -65))
    right_lobe, left_lobe = _ball(p, (28, 0, -72), (82, 84, 66)), _ball(p, (50, -38, -10), (42, 42, 82))
    hollow = _ball(p, (-35, 5, -25), (65, 55, 42))  # the underside, where gallbladder and bowel lie
    liver = (right_lobe | left_lobe) & ~hollow
    p = _own(rng, points, (36, 25, 92))
    spleen = _ball(p, (34, 22, 90), (58, 54, 42)) & ~_ball(p, (34, 0, 58), (85, 46, 34))
    kidney = np.zeros_like(liver)
    for side, height in ((-1, -28), (1, -14)):
        p = _own(rng, points, (height, 36, 66 * side))
        kidney |= _ball(p, (height, 36, 66 * side), (52, 25, 27)) & ~_ball(p, (height, 30, 42 * side), (20, 16, 18))
    p = _own(rng, points, (0, 26, 8)) + np.stack([0 * points[0], 0 * points[0], 6 * np.sin(points[0] / 45)])
    return {"Liver": liver, "Spleen": spleen, "Kidney": kidney, "Aorta": _ball(p, (26, 8), (13, 13))}


def _paint(rng: np.random.Generator, points: np.ndarray, device: Scanner) -> tuple[np.ndarray, np.ndarray]:
    """HU without noise and the labels, both (z, y, x); what is painted later hides what is painted earlier."""
    z, y, x = points
    flank, fat = np.abs(x), device.fat + rng.normal(0, 3)
    wall, cavity = _ball(points, (5, 0), (96, 144)), _ball(points, (0, 0), (82, 130))
    belly = cavity & (z < 98 - 50 * ((y / 90) ** 2 + (x / 130) ** 2))  # below the dome of the diaphragm
    ribs = wall & ~_ball(points, (2, 0), (86, 134)) & (np.abs((z + 0.5 * y) % 34 - 17) < 5) & (z > -45) & (flank > 40)
    body = _ball(points, (58, 0), (18, 23))
    arch = _ball(points, (82, 0), (15, 18)) | (flank < 4) & (y > 84) & (y < 106) & (z % 34 < 20)
    back = wall & (_ball(points, (84, 34), (22, 34)) | _ball(points, (84, -34), (22, 34)))
    psoas = (z < 0) & (_ball(points, (50, 37), (20, 15)) | _ball(points, (50, -37), (20, 15)))
    stomach = belly & _ball(_own(rng, points, (35, -28, 58)), (35, -28, 58), (48, 38, 42))

    # A patient's circulation shifts all that takes up contrast agent, and each part of it a little by itself.
    flow = rng.normal(1, 0.04)
    mean = {name: value * flow * rng.normal(1, 0.04) for name, value in device.hu.items()}
    layers = [(_ball(points, (5, 0), (96 + fat, 144 + fat)), -105), (wall, 58), (cavity, -95), (cavity & ~belly, -860),
              (cavity & _ball(points, (125, -20, 22), (42, 48, 52)), mean["cava"])]  # the heart is full of blood
    for _ in range(18):  # bowel: soft, with oral contrast as bright as an organ, or with gas
        centre, radii = rng.uniform((-115, -62, -100), (5, 5, 100)), rng.uniform(11, 24, 3)
        value = rng.choice([rng.normal(40, 15), rng.uniform(90, 220), -650], p=[0.55, 0.3, 0.15])
        layers.append((belly & _ball(points, tuple(centre), tuple(radii)), value))
    layers += [(stomach, rng.uniform(20, 60)), (stomach & (y < rng.normal(-45, 6)), -900), (back, 58), (psoas, 60),
               (ribs, 240), (arch, 260), (_ball(points, (80, 0), (7, 8)), 30), (body, 190), (body & (z % 34 > 26), 90),
               (belly & _ball(points, (-12, -38, -52), (26, 17, 16)), 10),  # gallbladder
               (_ball(points, (26, -26), (10, 14)), mean["cava"])]  # vena cava, the aorta's twin on the right
    labels = np.zeros(z.shape, np.uint8)
    for name, mask in _organs(rng, points).items():
        mask &= (cavity if name == "Aorta" else belly) & ~body
        labels[mask] = ORGANS[name]
        layers.append((mask, mean[name]))

    hu = np.full(z.shape, -1000.0)
    for mask, value in layers:
        hu[mask] = value
    return hu, labels
