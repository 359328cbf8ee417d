"""Imports point strictly down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minichat"

LAYERS = [
    {"console", "errors", "version"},
    {"device", "files", "formats", "patterns", "run_folder", "sources", "speculation", "words"},
    {
        "attention",
        "cache",
        "losses",
        "optim",
        "lora",
        "tokenizer",
        "sandbox",
        "metrics",
        "kernels",
        "readings",
        "lazy",
        "lazy_bridge",
    },
    {"chat", "model", "int4", "fused", "fused_cuda", "plots", "distributed"},
    {"examples", "weights", "generation"},
    {"data", "store", "checkpoint", "packed"},
    {"training"},
    {"plan"},
    {"cli", "runs", "converse", "evaluate", "harness", "hpu_selfcheck", "tune", "assets"},
]
# within a layer: who may import whom
BESIDE = {
    "fused": {"fused_cuda", "int4"},
    "fused_cuda": {"int4"},
    "lazy": {"lazy_bridge"},
    "lazy_bridge": {"lazy"},
    "runs": {"cli", "assets"},
    "converse": {"runs"},
    "evaluate": {"cli", "harness"},
    "harness": {"evaluate"},
    "hpu_selfcheck": {"cli"},
    "tune": {"cli"},
}
HEAVY = {
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "tqdm",
    "matplotlib",
    "pyarrow",
    "transformers",
    "triton",
}


def imports(file: Path) -> set[str]:
    """The modules of minichat that a file imports, anywhere in it but in its command: main() is a script of its own."""
    found = set()
    tree = ast.parse(file.read_text())
    is_command = lambda node: getattr(node, "name", "") == "main" or isinstance(node, ast.If)  # noqa: E731
    library = [inside for node in tree.body if not is_command(node) for inside in ast.walk(node)]
    for node in library:
        if isinstance(node, ast.ImportFrom) and node.module == "minichat":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minichat."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("minichat.")}
    return found


def modules() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "kernels").glob("*.py")]:
        inside = file.relative_to(PACKAGE.parent)
        name = "kernels" if inside.parts[0] == "kernels" else inside.parts[1].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, set()).update(imports(file))
    return found


def test_every_module_has_a_layer():
    assert set(modules()) == set().union(*LAYERS)


def test_imports_point_down():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for name, imported in modules().items():
        for other in imported - {name}:
            assert level[other] < level[name] or other in BESIDE.get(name, ()), f"{name} imports {other}"


def test_model_knows_neither_lora_nor_int4():
    assert modules()["model"] <= {"attention", "errors"}


def test_minichat_costs_little_beyond_torch():
    """No library but torch is imported before it is used; the scripts' help needs not even that."""
    code = (
        "import torch, sys; before = set(sys.modules); import minichat; minichat.lora; minichat.losses; minichat.int4; "
    )
    code += "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(found)
    code = "import sys; import minichat.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("script", ["train.py", "dpo.py", "infer.py"])
def test_help_imports_no_torch(script):
    code = f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
    code += f"try: runpy.run_path('{script}', run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.strip().endswith("False"), done.stderr
    assert "--model" in done.stdout
