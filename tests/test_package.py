"""The wheel: `pip install .` is enough, and the package then works from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# PYTHONPATH puts the installed wheel before the environment, which has the dependencies and perhaps this checkout too.
PROGRAM = """
import importlib, pkgutil, sys
from pathlib import Path
import minimti

folder, examples = map(Path, sys.argv[1:])
modules = [importlib.import_module(info.name) for info in pkgutil.walk_packages(minimti.__path__, "minimti.")]
for module in [minimti, *modules]:
    assert Path(module.__file__).is_relative_to(folder), module.__file__

from minimti.checkpoint.load import open_checkpoint

checkpoint = open_checkpoint("tiny")
assert checkpoint.path.is_relative_to(folder), checkpoint.path
print(len(modules), checkpoint.config.name)

svd = minimti.load("tiny")
clip = minimti.read_clip(examples / "dive.mp4", svd.config)
minimti.learn(svd, clip, steps=1).save("m.pt")
image = minimti.read_image(examples / "rocket.png", svd.config)
video = minimti.animate(svd, minimti.Motion.load("m.pt"), image, steps=1)
minimti.write_clip("rocket.mp4", video, fps=7)
"""


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, as setuptools writes build/ and an egg-info folder where it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("minimti", "weights/tiny"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", out, source)
    (path,) = out.iterdir()
    return path


def test_the_wheel_holds_the_code_and_the_embedded_model_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minimti").rglob("*.py")}
    weights = {f"minimti/tiny/{path.name}" for path in (ROOT / "weights" / "tiny").glob("*.safetensors")}
    assert names == code | weights and "minimti/tiny/tiny.safetensors" in weights and len(weights) == 2


@pytest.mark.full
def test_the_installed_package_works_from_another_folder(wheel, tmp_path):
    (tmp_path / "here").mkdir()
    with zipfile.ZipFile(wheel) as archive:  # a wheel without compiled code is installed by unpacking it
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    folders = (tmp_path / "site", ROOT / "examples")
    out = run(sys.executable, "-c", PROGRAM, *folders, cwd=tmp_path / "here", env=environment)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["m.pt", "rocket.mp4"]
    num_modules = len(list((ROOT / "minimti").rglob("*.py"))) - 1  # without minimti/__init__.py
    assert out.splitlines()[-1] == f"{num_modules} tiny"
