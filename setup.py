"""Packaging. The top-level folder trainers/ is installed as nnunet_transplant.trainers: nnU-Net finds it through
nnUNet_extTrainer, and nothing is ever written into nnU-Net's own package."""
import re
from pathlib import Path

from setuptools import find_packages, setup

HOME = ""  # the repository's public address, once it has one, such as https://github.com/NAME/nnunet_transplant


def readme() -> str:
    """With links that work outside of the repository: whole addresses, or where it has none, only their words."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    inside = r"(!?)\[([^]]*)\]\((?!https?://|#)([^)]+)\)"
    return re.sub(inside, rf"\1[\2]({HOME}/raw/main/\3)" if HOME else r"\2", text)


COMMANDS = ("trainers", "split_tasks", "merge", "extract", "predict", "evaluate", "interference", "flatness",
            "sweep", "landscape", "report", "spec", "demo")

setup(
    name="nnunet_transplant",
    version="0.2.0",
    description="Merge nnU-Nets as easily as you train them: wide-minima pre-training, task vectors, model merging",
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls={"Source": HOME, "Documentation": f"{HOME}/tree/main/documentation"} if HOME else {},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["nnunet_transplant", "nnunet_transplant.*"]), "nnunet_transplant.trainers"],
    package_dir={"nnunet_transplant.trainers": "trainers"},
    package_data={"nnunet_transplant": ["py.typed"], "nnunet_transplant.report_page": ["*.html", "*.css"]},
    install_requires=[
        "nnunetv2>=2.8.1",
        "torch>=2.6",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "SimpleITK>=2.2.1",
        "batchgenerators>=0.25.1",
        "dynamic-network-architectures>=0.4.4",
        "acvl-utils>=0.2.6",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "pandas>=2.0",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "optuna>=4.4",
        "cmaes>=0.11",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.7", "ruff>=0.6", "mypy>=1.11", "setuptools>=77"],
        "benchmark": ["mergekit>=0.1.5", "fusion_bench>=0.2.33"],  # what benchmarks/merge_speed.py compares with
    },
    entry_points={
        "console_scripts": [f"nnunet_transplant_{name} = nnunet_transplant.cli.{name}:main" for name in COMMANDS]
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
