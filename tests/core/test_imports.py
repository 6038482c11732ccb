"""What may import what: the mathematics knows neither world, and the worlds do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lm_trust.core

PACKAGE = Path(lm_trust.core.__file__).parent.parent
INTERFACE = {
    *("gae", "returns_to_go", "leave_one_out", "group_relative", "masked_mean", "masked_whiten"),
    *("Categorical", "DiagonalGaussian", "kl_estimators"),
    *("FisherOperator", "conjugate_gradient", "trust_region_step", "StepReport"),
    *("clipped_surrogate", "clipped_value_loss"),
}

# A part of the package, and the parts (or other packages) that it must not import.
ABOVE = {"training", "compare", "stages", "cli"}
WORLDS = {"control", "lm", "gymnasium", "transformers", "peft"}
FORBIDDEN = {
    "core": {*ABOVE, *WORLDS, "updates", "yaml"},
    "updates": {*ABOVE, *WORLDS},
    "control": {*ABOVE, "lm", "transformers", "peft"},
    "lm": {*ABOVE, "control"},
    "training": {"compare", "stages", "cli"},
    "stages": {"compare", "control", "cli"},
    "compare": {"stages"},  # and calls the command line, whose runs it compares
}


def imported_by(path):
    """Every module that a file imports, relative imports resolved, at whatever depth the statement stands."""
    package = ("lm_trust", *path.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def reaches(name, forbidden):
    """Whether an imported name lies in a forbidden part of lm_trust or in a forbidden package."""
    parts = name.split(".")
    return parts[1] in forbidden if parts[0] == "lm_trust" and len(parts) > 1 else parts[0] in forbidden


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_imports_run_one_way(part):
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files, f"lm_trust/{part} has no modules"
    found = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files
        for name in imported_by(path)
        if reaches(name, FORBIDDEN[part])
    }
    assert not found, "\n".join(sorted(found))


def test_the_check_itself_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "lm").mkdir()
    path = tmp_path / "lm" / "wrong.py"
    for line in (
        "import lm_trust.control.policies",
        "from lm_trust import control",
        "from lm_trust.control.policies import x",
        "from .. import control",
        "from ..control import policies",
        "def f():\n    from ..control.policies import x",
    ):
        path.write_text(line)
        assert any(reaches(name, {"control"}) for name in imported_by(path)), line
    path.write_text("from ..core import control_variate\nfrom . import control\nimport controller")
    assert not any(reaches(name, {"control"}) for name in imported_by(path))


@pytest.mark.parametrize("part", ["lm_trust.core", "lm_trust.updates"])
def test_importing_the_mathematics_loads_neither_world(part):
    program = (
        f"import sys, {part}\n"
        "worlds = 'gymnasium transformers peft tokenizers mujoco lm_trust.lm lm_trust.control'.split()\n"
        "print([name for name in worlds if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_interface_is_there():
    assert not [name for name in INTERFACE if not hasattr(lm_trust.core, name)]
