"""What an installation puts where: our trainers inside our package, nothing inside nnU-Net's."""
import itertools
import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_trainers_and_nothing_of_nnunetv2(tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "-w", tmp_path, source], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"nnunet_transplant", next(top for top in tops if top.endswith(".dist-info"))}
    assert {f"nnunet_transplant/trainers/nnUNetTrainer{kind}.py" for kind in ("Stable", "Plastic", "TaskVector")} \
        <= set(names)
    assert {"nnunet_transplant/py.typed", *(f"nnunet_transplant/report_page/{name}" for name in (
        "page.html", "macros.html", "style.css"))} <= set(names)
    assert {name for name in names if name.endswith(".py")} == {
        f"{'nnunet_transplant/' * (folder == 'trainers')}{path.relative_to(PROJECT).as_posix()}"
        for folder in ("nnunet_transplant", "trainers") for path in (PROJECT / folder).rglob("*.py")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_nnunet_finds_the_trainers_of_an_installation(tmp_path: Path, editable: bool) -> None:
    """In an environment of its own that sees this one's other packages: the README's second line, nnU-Net's search,
    and an uninstallation that leaves nothing."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, text=True,
                              capture_output=True).stdout.strip()
    others = tmp_path / "others"  # all but any installation of this package
    others.mkdir()
    for entry in Path(site.getsitepackages()[0]).iterdir():
        if not entry.name.startswith(("nnunet_transplant", "__editable__")):
            (others / entry.name).symlink_to(entry)
    Path(packages, "others.pth").write_text(f"{others}\n")
    before = sorted(Path(packages).iterdir())
    source = copy_of_the_project(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"}
    pip = [sys.executable, "-m", "pip", "--python", python]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*pip, "install", *options, *(["-e"] if editable else []), source], check=True, env=environment)
    value = subprocess.run([python.with_name("nnunet_transplant_trainers")], check=True, capture_output=True, text=True,
                           env=environment, cwd=tmp_path).stdout.strip()
    assert Path(value) == (source / "trainers" if editable else Path(packages) / "nnunet_transplant" / "trainers")
    search = ("from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
              "for name in ('Stable', 'Plastic_7epochs', 'TaskVector_1epochs_2iterations_NoMirroring'):\n"
              "    print(find('nnUNetTrainer' + name).__name__)")
    found = subprocess.run([python, "-c", search], check=True, capture_output=True, text=True, cwd=tmp_path,
                           env=environment | {"nnUNet_extTrainer": value}).stdout
    assert "nnUNetTrainerTaskVector_1epochs_2iterations_NoMirroring" in found.splitlines()
    subprocess.run([*pip, "uninstall", "--quiet", "-y", "nnunet_transplant"], check=True, env=environment)
    assert sorted(path for path in Path(packages).iterdir() if path.name != "__pycache__") == before
    assert not list((tmp_path / "venv" / "bin").glob("nnunet_transplant*"))


def copy_of_the_project(tmp_path: Path) -> Path:
    """Building writes into the source folder: leave the checkout alone."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((PROJECT / name).read_bytes())
    for folder, suffix in itertools.product(("nnunet_transplant", "trainers"), ("py", "html", "css", "typed")):
        for path in (PROJECT / folder).rglob(f"*.{suffix}"):
            target = source / path.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return source
