"""All files of the project are written atomically, through ``llamagen.files``."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import SOURCES, relative

WRITER = "llamagen/files.py"
ATOMIC = {"atomic_file", "atomic_folder", "PendingFile", "temporary_name"}
"""Functions that give a temporary name."""
MEMORY = {"BytesIO", "StringIO", "TemporaryDirectory"}
"""Buffers without a file, and folders that no other process knows."""
TARGETS = {  # functions that write, and the index of the argument they write to; −1: the object itself
    **dict.fromkeys(("write_text", "write_bytes", "touch"), -1),
    **dict.fromkeys(("savez", "savez_compressed", "savefig", "TarWriter", "ZipFile", "extractall", "symlink_to"), 0),
    "save_hparams_to_yaml": 0,
    **dict.fromkeys(("save_file", "download_url_to_file", "copyfile", "copytree", "copy2", "move", "get_file"), 1),
}
EXCEPTIONS = {
    # Appends rows to metrics.csv, and removes half rows.
    ("lightning_modules/metrics_file.py", "path"),
    # An incomplete download, which is kept to be resumed; its final name is given by publish_file.
    ("llamagen/hub/transfer.py", "partial"),
    # A method of this project.
    ("evaluation/__main__.py", "out"),
    # Input of measurements, in temporary folders.
    ("benchmarks/data_layer.py", "plain / f'{number}.npy'"),
    ("benchmarks/data_layer.py", "plain / f'{number}.label.npy'"),
    ("benchmarks/account_for_keys.py", "path"),
    ("benchmarks/account_for_keys.py", "work / 'images'"),
    ("benchmarks/bench_evaluation.py", "path"),
    ("benchmarks/bench_evaluation.py", "archive"),
    ("benchmarks/tokenizer_step.py", "path"),
    # Output of a running command, to which each attempt appends.
    ("benchmarks/recipe_runs.py", "log"),
}


def write_target(call: ast.Call) -> ast.expr | None:
    """The target of a call that writes; None for other calls."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    owner = function.value if isinstance(function, ast.Attribute) else None
    module = owner.id if isinstance(owner, ast.Name) else ""
    if name in ("open", "ZipFile"):
        of_path = name == "open" and owner is not None and module not in ("tarfile", "os")
        mode = arguments.get("mode", call.args[0 if of_path else 1] if len(call.args) > (0 if of_path else 1) else None)
        writes = isinstance(mode, ast.Constant) and set(str(mode.value)) & set("wax+") and module != "os"
        return (owner if of_path else call.args[0] if call.args else arguments.get("fileobj")) if writes else None
    if name == "save" and (module in ("torch", "np", "numpy") or owner is not None):
        if not call.args:
            return None  # a method without a path
        return call.args[1] if module == "torch" else call.args[0]
    if name in TARGETS:
        place = TARGETS[name]
        return owner if place < 0 else (call.args[place] if len(call.args) > place else None)
    return None


def names_in(node: ast.AST | None) -> set[str]:
    return {
        each.id if isinstance(each, ast.Name) else each.attr
        for each in (ast.walk(node) if node is not None else ())
        if isinstance(each, ast.Name | ast.Attribute)
    }


def temporary_names(tree: ast.AST) -> set[str]:
    """Names of temporary files and buffers, and names derived from them."""
    known = {*ATOMIC, *MEMORY}
    while True:
        before = len(known)
        for node in ast.walk(tree):
            if isinstance(node, ast.withitem) and node.optional_vars is not None:
                if names_in(node.context_expr) & known:
                    known |= names_in(node.optional_vars)
            elif isinstance(node, ast.Assign) and names_in(node.value) & known:
                known |= {name for target in node.targets for name in names_in(target)} - {"self"}
        if len(known) == before:
            return known


def unsafe_writes(source: str) -> Iterator[tuple[str, int]]:
    """Targets of writes without a temporary name, and their lines."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.Module):
            continue
        known = temporary_names(function) | {"temporary"}
        nested = {
            id(n)
            for f in ast.walk(function)
            if f is not function and isinstance(f, ast.FunctionDef)
            for n in ast.walk(f)
        }
        for node in ast.walk(function):
            target = write_target(node) if isinstance(node, ast.Call) and id(node) not in nested else None
            if target is not None and not names_in(target) & known:
                yield ast.unparse(target), node.lineno


@pytest.mark.parametrize("path", [path for path in SOURCES if relative(path) != WRITER], ids=relative)
def test_sources_write_only_to_temporary_names(path: Path) -> None:
    found = set(unsafe_writes(path.read_text()))
    assert {each for each in found if (relative(path), each[0]) not in EXCEPTIONS} == set()


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("with atomic_file(path) as temporary:\n    temporary.write_text('a')", False),
        ("with atomic_file(path) as new, new.open('wb') as file:\n    np.savez(file, a=a)", False),
        ("with atomic_folder(path) as new:\n    (new / 'a').write_bytes(b'')", False),
        ("buffer = BytesIO()\nnp.save(buffer, a)", False),
        ("with open(path, 'rb') as file:\n    file.read()", False),
        ("path.open()", False),
        ("path.write_text('a')", True),
        ("with open(path, 'w') as file:\n    pass", True),
        ("open(path, mode='ab')", True),
        ("path.open('r+b')", True),
        ("torch.save(content, path)", True),
        ("image.save(path, format='png')", True),
        ("np.savez(path, a=a)", True),
        ("save_file(state, path)", True),
        ("with zipfile.ZipFile(path, 'w') as archive:\n    pass", True),
        ("def f(path):\n    with atomic_file(path) as t:\n        path.write_text('a')", True),
        ("def f(path):\n    with atomic_file(path) as t:\n        pass\ndef g(t):\n    t.write_text('a')", True),
    ],
)
def test_detects_writes_without_a_temporary_name(source: str, wrong: bool) -> None:
    assert bool(list(unsafe_writes(source))) is wrong
