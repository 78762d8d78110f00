"""The package as it is built and imported: what a wheel holds, and who imports whom."""

import ast
import email
import graphlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

import fusedrnn

ROOT = Path(__file__).parents[1]
FOLDERS = {"fusedrnn": ROOT / "fusedrnn", "fusedrnn.kernels": ROOT / "kernels"}


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a new interpreter, away from this folder, which would be found first."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=tempfile.gettempdir(),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# ------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of `make wheel`, or one built from a copy: a build leaves files in its source."""
    if "FUSEDRNN_WHEEL" in os.environ:
        return ROOT / os.environ["FUSEDRNN_WHEEL"]
    copy = tmp_path_factory.mktemp("source")
    for name in ("fusedrnn", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
        + ["--no-index", "--wheel-dir", "dist", "."],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def test_wheel_holds_every_module_once_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = sorted(n for n in archive.namelist() if ".dist-info/" not in n)
    wanted = [
        f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for file in [*folder.rglob("*.py"), *folder.rglob("*.json"), *folder.rglob("py.typed")]
    ]
    assert inside == sorted(wanted)
    assert "fusedrnn/py.typed" in inside
    assert "fusedrnn/kernels/__init__.py" in inside


def test_metadata_of_the_wheel(wheel):
    assert wheel.name == f"fusedrnn-{fusedrnn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert metadata["Version"] == fusedrnn.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Author"] == "fusedrnn developers"
    assert [url.split(", ")[0] for url in metadata.get_all("Project-URL")] == ["Homepage"]
    classifiers = metadata.get_all("Classifier")
    for minor in range(10, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert "Typing :: Typed" in classifiers
    needed = {n for n in metadata.get_all("Requires-Dist") if "extra ==" not in n}
    assert needed == {"torch>=2.10", "typing-extensions"}


def test_wheel_works_when_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    ran = python(
        """
        import fusedrnn, fusedrnn.kernels.plan, torch
        print(fusedrnn.__file__, fusedrnn.kernels.plan.__file__, sep="\\n")
        fusedrnn.LSTM(3, 4)(torch.zeros(5, 2, 3))
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert ran.returncode == 0, ran.stderr
    for file in ran.stdout.splitlines():
        assert Path(file).is_relative_to(tmp_path)


def test_one_version_everywhere():
    def found(pattern, name):
        return re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)[1]

    # The wheel's is read from the package, where it is a literal: to build needs no torch.
    assert found(r'^__version__ = "(.+)"', "fusedrnn/__init__.py") == fusedrnn.__version__
    for name in ("pyproject.toml", "setup.py"):
        assert fusedrnn.__version__ not in (ROOT / name).read_text()
    assert found(r"^## \[?([0-9.]+)", "CHANGELOG.md") == fusedrnn.__version__


def test_torch_package_interns_it(tmp_path):
    """Modules in such a package are not in sys.modules, where dataclasses look up annotations
    that are strings: files with dataclasses import no annotations from __future__."""
    ran = python(
        """
        import sys
        import torch
        from torch import package
        import fusedrnn

        models = [fusedrnn.LSTM(3, 4, zoneout=0.1).eval(), fusedrnn.GRU(3, 4, save="states")]
        with package.PackageExporter(sys.argv[1]) as exporter:
            exporter.intern("fusedrnn.**")
            exporter.extern(["torch", "torch.**", "triton", "triton.**", "numpy"])
            exporter.extern(["typing_extensions", "onnxscript", "sys"])
            exporter.save_pickle("model", "model.pkl", models)
        importer = package.PackageImporter(sys.argv[1])
        x = torch.randn(5, 2, 3)
        for mine, theirs in zip(models, importer.load_pickle("model", "model.pkl")):
            assert type(mine) is not type(theirs)
            assert torch.equal(mine(x)[0], theirs(x)[0])
        if importer.import_module("fusedrnn.backends.triton").MISSING is None:
            importer.import_module("fusedrnn.kernels")
        """,
        str(tmp_path / "model.pt"),
        TRITON_INTERPRET="1",
    )
    assert ran.returncode == 0, ran.stderr


# ----------------------------------------------------------------------- an existing environment


def test_make_keeps_an_installed_fusedrnn(wheel, tmp_path):
    """`make demo VENV=path` runs the fusedrnn that is there, and says so; `make test` refuses."""
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    venv.create(tmp_path / "venv", symlinks=True)
    (site / "torch_and_the_rest.pth").write_text(sysconfig.get_path("purelib"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    before = {file: file.stat().st_mtime_ns for file in site.rglob("*.py")}
    for name in ("fusedrnn", "kernels", "examples"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name)
    for name in ("Makefile", "constraints.txt", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "checkout")

    def make(target: str) -> subprocess.CompletedProcess:
        arguments = f"--text examples/char_lm.py --hidden 8 --steps 2 --sample 5 --out {tmp_path}"
        return subprocess.run(
            ["make", target, f"VENV={tmp_path / 'venv'}", f"ARGS={arguments}"],
            cwd=tmp_path / "checkout",
            env={**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )

    demo = make("demo")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    origin = str(site / "fusedrnn" / "__init__.py")
    assert f"has a fusedrnn, which stays and which the demo runs: {origin}" in demo.stdout
    test = make("test")
    assert test.returncode != 0
    assert f"has another fusedrnn, {origin}: uninstall it there" in test.stderr
    after = {file: file.stat().st_mtime_ns for file in site.rglob("*.py")}
    assert after == before


# ---------------------------------------------------------------- without Triton and without NumPy

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "numpy"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
sys.modules["triton"] = sys.modules["numpy"] = None
"""


def test_import_leaves_triton_alone():
    ran = python("import fusedrnn, sys; print([m for m in sys.modules if 'fusedrnn.kernels' in m])")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_works_on_the_cpu_without_triton_and_numpy():
    ran = python(
        BLOCK
        + textwrap.dedent(
            """
            import torch
            import fusedrnn

            for name in ("LSTM", "GRU", "RNN"):
                theirs = getattr(torch.nn, name)(5, 7, num_layers=2, bidirectional=True)
                ours = getattr(fusedrnn, name)(5, 7, num_layers=2, bidirectional=True)
                ours.load_state_dict(theirs.state_dict())
                x = torch.randn(6, 3, 5)
                for rnn in (theirs, ours):
                    rnn(x)[0].square().sum().backward()
                assert torch.equal(ours(x)[0], theirs(x)[0])
                for p, q in zip(ours.parameters(), theirs.parameters()):
                    assert torch.allclose(p.grad, q.grad)
                ours(x, lengths=[6, 2, 0])
                ours(x, reset=torch.rand(6, 3) < 0.5)
            why = fusedrnn.explain(ours, x).passed_over["triton"]
            assert "triton is not installed" in why, why
            try:
                fusedrnn.LSTM(5, 7, backend="triton")(x)
            except RuntimeError as error:
                assert "triton is not installed" in str(error), error
            else:
                raise SystemExit("a backend that is not there ran")
            assert sys.modules["numpy"] is None
            assert not any(name.startswith("triton.") for name in sys.modules)
            """
        )
    )
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------ who imports whom


def sources() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    """The dotted names a file imports; `from a import b` counts as a.b."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, inside functions too."""
    modules = sources()
    graph = {}
    for name, file in modules.items():
        graph[name] = set()
        for target in imports(file):
            known = target if target in modules else target.rpartition(".")[0]
            if known in modules:
                graph[name].add(known)
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        for target in graph[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen


def test_imports_have_no_cycle():
    tuple(graphlib.TopologicalSorter(import_graph()).static_order())


def test_imports_point_one_way():
    graph = import_graph()
    chain = ["cells", "call", "kernels", "backends", "op", "stack", "functional", "modules"]
    for place, name in enumerate(chain):
        for start in (m for m in graph if f"{m}.".startswith(f"fusedrnn.{name}.")):
            for later in chain[place + 1 :]:
                assert f"fusedrnn.{later}" not in reachable(graph, start), f"{start} -> {later}"
    # The chain is one: each link is there.
    assert any(m.startswith("fusedrnn.cells") for m in graph["fusedrnn.kernels.bind"])
    assert "fusedrnn.call" in graph["fusedrnn.kernels.launch"]
    assert "fusedrnn.kernels" in graph["fusedrnn.backends.triton"]
    assert "fusedrnn.backends.triton" in graph["fusedrnn.op"]
    assert "fusedrnn.op" in graph["fusedrnn.stack"]
    assert "fusedrnn.stack" in graph["fusedrnn.functional"]
    assert "fusedrnn.functional" in graph["fusedrnn.modules"]


def test_reference_knows_the_cells_and_no_backend():
    outside = {"kernels", "op", "stack", "functional", "modules", "dispatch"}
    found = {m.split(".")[1] for m in reachable(import_graph(), "fusedrnn.backends.reference")}
    assert "cells" in found
    assert not found & outside


def test_only_the_kernels_import_triton():
    for name, file in sources().items():
        if not name.startswith("fusedrnn.kernels"):
            assert not [n for n in imports(file) if n.split(".")[0] == "triton"], name
            early = [n for n in imports(file, True) if n.startswith("fusedrnn.kernels")]
            assert not early, f"{name} imports the kernels before a call needs them"


def test_nobody_imports_the_other_package_of_that_name():
    # `import kernels` works inside this folder, and finds another project's package elsewhere.
    for folder in ("fusedrnn", "kernels", "tests", "bench", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not [n for n in imports(file) if n.split(".")[0] == "kernels"], file


def test_an_import_loads_only_torch():
    """README says so; torch._dynamo alone takes a second. Nor does a call on a CPU load Triton."""
    code = """
import sys, torch
heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton", "onnx", "opacus", "matplotlib"}
before = heavy & set(sys.modules)
import fusedrnn
print(sorted(heavy & set(sys.modules) - before))
fusedrnn.LSTM(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()
print("triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
    assert "loads no Triton until a call needs it" in (ROOT / "README.md").read_text()
