"""The house: imports look down only, flags are read-only, and `--help` does not wait for heavy packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the bottom to the top: a module may import those before it, and nothing else of this project
ORDER = """
    models.utils models.sites models.launch models.passes models.kernels models.mlp_kernels models.triton_switch
    models.mlp models.depthwise models.weights models.cost models.convnextv2
    models.convnextv2_sparse models.convnextv2_minkowski models.fcmae models.files utils flags schema
    sources tables shards index images image_sets optim_factory run checkpoints
    augmentations evaluation tasks
    datasets loaders
    engine_pretrain engine_finetune
    hooks resume
    main_pretrain main_finetune submitit_pretrain submitit_finetune
""".split()
FILES = [path for folder in (".", "models", "tools", "examples") for path in ROOT.glob(f"{folder}/*.py")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES if path.stem != "__init__"}


def find_imports(name):
    """The modules of this project that a module imports, at its top or within functions."""
    package, found = name.rpartition(".")[0], set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(name for name in MODULES if not name.startswith(("tools.", "examples.")))


@pytest.mark.parametrize("name", ORDER)
def test_imports_look_down_only(name):
    assert find_imports(name) <= set(ORDER[: ORDER.index(name)])


def test_models_import_models_only_and_by_relative_imports():
    for name in (name for name in ORDER if name.startswith("models.")):
        assert all(imported.startswith("models.") for imported in find_imports(name))
        assert "from models" not in MODULES[name].read_text() and "import models" not in MODULES[name].read_text()


def test_flags_are_read_only():
    """No line assigns to an attribute of `args`, whatever it is called by."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) else []:
                owner = ast.unparse(target.value) if isinstance(target, ast.Attribute) else ""
                assert owner != "args" and not owner.endswith(".args"), f"{name}: {ast.unparse(node)}"


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune", "submitit_pretrain", "submitit_finetune"])
def test_help_imports_nothing_heavier_than_torch(script):
    code = (
        f"import sys, {script}\n"
        "heavy = {'timm', 'torchvision', 'sklearn', 'tensorboard', 'submitit', 'triton', 'torch._dynamo'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
