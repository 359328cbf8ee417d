"""A clone, an editable install and a wheel all work, beside the other package named `kernels`; and start fast."""

import ast
import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import minichat
from minichat import run_folder

ROOT = Path(__file__).parent.parent

# in each of the three: argv is the folder to install from, and whether its .pth files count (an editable install)
USE = """
import json, site, sys
folder, packages = sys.argv[1], sys.argv[2:]
site.addsitedir(folder)
sys.path[:0] = ["fake", folder]
sys.path += packages
import kernels
import minichat, torch
from importlib.metadata import version
from minichat import cli, int4, run_folder
from minichat.kernels import cpu, int4_reference

layer = int4.Int4Linear.from_weight(torch.randn(48, 64), int4.Scheme())
x = torch.randn(3, 64)
error = float((layer(x) - x @ layer.dequantize().T).abs().max())
model, tokenizer = minichat.load(cli.BASE, int4=True)
[ids] = minichat.generate(model, [tokenizer.encode("1 + 1 =")], 3, stop_ids=())
files = [minichat.__file__, *cpu.SOURCES, int4_reference.__file__, *cli.BASE.parent.glob("*.args")]
print(json.dumps(dict(other=kernels.whose, version=version("minichat") if len(sys.argv) > 2 else "", error=error,
    new=len(ids), commit=run_folder._commit(), files=[str(f) for f in files], there=cpu.SOURCES[0].is_file())))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the checkout, so that nothing is built in this one."""
    folder = tmp_path_factory.mktemp("clone") / "minichat"
    skip = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=skip)
    return folder


def build(clone, hook, to) -> Path:
    """What pip calls to build a wheel, or the one of an editable install."""
    code = f"import setuptools.build_meta as backend; print(backend.{hook}({str(to)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    pytest.importorskip("setuptools")
    return build(clone, "build_wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel, clone):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"minichat-{minichat.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"minichat", info}
    package = {str(file.relative_to(clone)) for file in (clone / "minichat").rglob("*") if file.is_file()}
    kernels = {f"minichat/kernels/src/{file.name}" for file in (clone / "kernels").iterdir() if file.is_file()}
    assert {name for name in names if name.startswith("minichat/")} == package | kernels
    for name in ("assets/base/model.safetensors", "assets/sft.args", "kernels/src/int4_cpu.cpp", "kernels/cpu.py"):
        assert f"minichat/{name}" in names
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    meta = archive.read(f"minichat-{minichat.__version__}.dist-info/METADATA").decode()
    assert f"Version: {minichat.__version__}\n" in meta and "Apache-2.0" in meta and "Requires-Python: >=3.10" in meta
    for oracle in ("transformers", "peft", "trl", "compressed-tensors", "matplotlib"):  # never core dependencies
        lines = [line for line in meta.splitlines() if line.startswith(f"Requires-Dist: {oracle}")]
        assert lines and all("extra ==" in line for line in lines)
    for item in archive.infolist():  # installed by root, read by others
        assert (item.external_attr >> 16) & 0o044 == 0o044, item.filename


@pytest.mark.slow
@pytest.mark.parametrize("way", ["clone", "editable", "wheel"])
def test_installed_beside_the_other_kernels(way, clone, wheel, tmp_path):
    (tmp_path / "fake" / "kernels").mkdir(parents=True)
    (tmp_path / "fake" / "kernels" / "__init__.py").write_text("whose = 'another'\n")
    folder = clone
    if way != "clone":
        # in a repository that is somebody else's
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q", tmp_path], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], cwd=tmp_path, check=True)
        folder = tmp_path / "site"
        source = wheel if way == "wheel" else build(clone, "build_editable", tmp_path)
        zipfile.ZipFile(source).extractall(folder)
    # -S: without the .pth files of this environment, where minichat may be installed already
    packages = [path for path in site.getsitepackages() if os.path.isdir(path)]
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE, folder, *packages], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["other"] == "another" and found["there"] and found["commit"] is None
    assert found["error"] < 1e-2 and found["new"] == 3
    assert all(Path(file).is_relative_to(folder if way == "wheel" else clone) for file in found["files"])
    assert len(found["files"]) == 6
    if way == "wheel":
        assert found["version"] == minichat.__version__


def test_the_commit_is_the_checkouts():
    if not (ROOT / ".git").exists():
        assert run_folder._commit() is None
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert head.startswith(run_folder._commit().removesuffix("+"))


def test_every_file_is_python_3_10():
    files = [file for folder in ("minichat", "kernels", "tests", "bench") for file in (ROOT / folder).rglob("*.py")]
    files += ROOT.glob("*.py")
    assert len(files) > 30
    for file in files:
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 10))


def test_the_license_is_there():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0" in text
