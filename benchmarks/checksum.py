"""One checksum of a dataset in nnU-Net's raw format, whatever its files are compressed with: SHA-256 of the voxels of
all images and label maps, in the order of their names.

    python benchmarks/checksum.py DATA/Dataset004_Hippocampus
"""
import argparse
import hashlib
from pathlib import Path

import SimpleITK

TYPES = {"imagesTr": SimpleITK.sitkFloat32, "labelsTr": SimpleITK.sitkUInt8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    dataset = parser.parse_args().dataset
    checksum, count = hashlib.sha256(), 0
    for folder, kind in TYPES.items():
        for file in sorted((dataset / folder).iterdir()):
            image = SimpleITK.ReadImage(str(file), kind)
            checksum.update(f"{file.name} {image.GetSize()}".encode())
            checksum.update(SimpleITK.GetArrayViewFromImage(image).tobytes())
            count += 1
    print(f"{checksum.hexdigest()}  {dataset.name}, {count} files")


if __name__ == "__main__":
    main()
