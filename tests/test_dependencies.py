"""What pyproject declares is what the code imports, and what is installed is what constraints-cpu.txt locks."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # the others have the name that is imported
NEVER_IMPORTED = {
    "protobuf": "transformers reads SentencePiece's tokenizer.model by it",
    "sentencepiece": "transformers reads SentencePiece's tokenizer.model by it",
    "decord": "lmms-eval's llava_hf imports it and does not require it",
    "lmms-eval": "a program of its own: python -m lmms_eval",
    "pre-commit": "a program",
    "pytest-timeout": "a plugin of pytest, for `timeout` in pyproject",
    "ruff": "a program",
}
NOT_DECLARED = dict.fromkeys(
    ("tensorboard", "wandb"), "train.report_to names it, and is refused in one line where it is not installed"
)
NOT_FROZEN = {"pip", "setuptools", "wheel"}  # pip freeze leaves them out


def declared() -> dict[str, list[Requirement]]:
    """pyproject's requirements that hold on this machine: "" for the core, and of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    parsed = {name: map(Requirement, lines) for name, lines in groups.items()}
    return {name: [each for each in group if holds(each)] for name, group in parsed.items()}


def holds(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def names_of(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements}


def locked() -> dict[str, Version]:
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def installed(requirements: Iterable[Requirement]) -> dict[str, Version | None]:
    """The versions of what `requirements` name, None where one is missing, and of all that these require in turn."""
    versions: dict[str, Version | None] = {}
    todo = [(requirement, True) for requirement in requirements]
    seen = set()
    while todo:
        requirement, asked = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if asked:
                versions[name] = None
            continue
        versions[name] = Version(distribution.version)
        for extra in {"", *requirement.extras} - {extra for each, extra in seen if each == name}:
            seen.add((name, extra))
            todo += [(each, False) for each in map(Requirement, distribution.requires or ()) if holds(each, extra)]
    return versions


def differences(found: dict[str, Version | None], lock: dict[str, Version]) -> list[str]:
    """One text for each package whose version is not the locked one; local versions (+cpu) are not compared."""
    texts = []
    for name, version in sorted(found.items()):
        wanted = lock.get(name)
        if version is None:
            texts.append(f"{name} is missing (locked {wanted})")
        elif name not in NOT_FROZEN and (wanted is None or version.public != wanted.public):
            texts.append(f"{name} {version} (locked {wanted})")
    return texts


def test_the_lock_holds_all_that_is_declared_within_its_bounds():
    lock = locked()
    for requirement in (each for group in declared().values() for each in group):
        assert canonicalize_name(requirement.name) in lock, f"{requirement} is not locked"
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), requirement
    installs = set(re.findall(r"pip install torch==(\S+)", (ROOT / "README.md").read_text()))
    assert installs == {str(lock["torch"])}


def test_the_environment_is_the_locked_one():
    core, *extras = declared().values()
    asked = [each for group in extras for each in group if installed([each])[canonicalize_name(each.name)]]
    if different := differences(installed([*core, *asked]), locked()):
        text = f"the environment is not that of constraints-cpu.txt: {', '.join(different)}"
        (pytest.fail if os.environ.get("SWITCHKD_LOCKED") == "1" else pytest.skip)(text)


def test_what_counts_as_another_version():
    lock = {"torch": Version("2.13.0"), "peft": Version("0.21.2"), "tqdm": Version("4.70")}
    found = {"torch": Version("2.13.0+cpu"), "peft": Version("0.21.1"), "tqdm": None, "timm": Version("1.0")}
    found |= {"setuptools": Version("80")}
    assert differences(found, lock) == [
        "peft 0.21.1 (locked 0.21.2)",
        "timm 1.0 (locked None)",
        "tqdm is missing (locked 4.70)",
    ]
    closure = installed([Requirement("transformers"), Requirement("no-such-package-1")])
    assert closure["tokenizers"] is not None  # of transformers
    assert closure["no-such-package-1"] is None


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """The top-level names that a file imports, each with whether a function does so, when it is called."""
    tree = ast.parse(source)
    functions = (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.level == 0 else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            modules = [ast.literal_eval(node.args[0])]
        else:
            continue
        yield from ((module.partition(".")[0], id(node) in inner) for module in modules)


def imported(*folders: str) -> dict[str, bool]:
    """The distributions that the code in `folders` imports, each with whether only functions do so."""
    own = {"switchkd", "recipes", "eval", "tests"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    found: dict[str, bool] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for name, later in imports(path.read_text()):
            if name not in sys.stdlib_module_names and name not in own:
                distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
                found[distribution] = found.get(distribution, True) and later
    return found


def test_what_is_imported_is_declared():
    groups = {name: names_of(group) for name, group in declared().items()}
    core, all_of_them = groups[""], set().union(*groups.values())
    for_users = all_of_them - (groups["dev"] - core)
    package = {name: later for name, later in imported("switchkd", "recipes").items() if name not in NOT_DECLARED}
    assert {name for name, later in package.items() if not later} <= core
    assert package.keys() <= for_users
    assert imported("eval", "tests").keys() - NOT_DECLARED.keys() <= all_of_them


def test_what_is_declared_is_imported():
    groups = {name: names_of(group) for name, group in declared().items()}
    package, everything = imported("switchkd", "recipes", "eval").keys(), imported("eval", "tests").keys()
    reasons = NEVER_IMPORTED.keys()
    assert groups[""] - package - reasons == set()
    assert set().union(*groups.values()) - package - everything - reasons == set()
    assert reasons & package == set(), "imported after all"
    assert reasons - set().union(*groups.values()) <= {"decord"}, "no longer declared"


def test_imports_are_found_wherever_they_stand():
    source = "import os.path, yaml\nfrom . import a\ntry:\n    from google.protobuf import b\nexcept ImportError: ...\n"
    source += "def f():\n    from PIL import Image\n    c = pytest.importorskip('pyarrow.parquet')\n"
    assert set(imports(source)) == {
        ("os", False),
        ("yaml", False),
        ("google", False),
        ("PIL", True),
        ("pyarrow", True),
    }
