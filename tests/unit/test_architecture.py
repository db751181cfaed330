"""The boundaries of design.md section 4 and the conventions of section 6 that a parser can see."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ds_cp.batch import SequenceContext

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ds_cp"


def _table(rows: Mapping[str, str]) -> Mapping[str, frozenset[str]]:
    return {name: frozenset(targets.split()) for name, targets in rows.items()}


IMPORTS = _table(
    {
        "config": "",
        "topology": "",
        "balance": "",
        "layout": "balance",
        "timing": "",
        "profiling": "",
        "comm": "timing",
        "lanes": "",
        "late": "",
        "factor": "",
        "preflight": "",
        "watch": "",
        "agreement": "",
        "launch": "preflight",
        "reliable": "models watch",
        "tiles": "layout balance",
        "mesh": "topology timing",
        "kernels": "",
        "kernels.attention": "tiles kernels.flash4_hopper kernels.sums",
        "kernels.flash4_hopper": "tiles kernels.blocked kernels.sums",
        "kernels.sums": "tiles kernels.merge",
        "kernels.blocked": "kernels.blocked_cuda",
        "kernels.blocked_cuda": "",
        "kernels.delta": "tiles kernels.affine",
        "kernels.affine": "",
        "kernels.ssd": "kernels.delta",
        "kernels.kda": "kernels.delta",
        "kernels.selective": "kernels.delta",
        "kernels.merge": "kernels.merge_cuda",
        "kernels.merge_cuda": "",
        "kernels.probe": "tiles kernels.attention",
        "kernels.choice": "tiles kernels.attention kernels.sums",
        "reshard": "layout comm",
        "convolution": "layout comm mesh",
        "indexed": "attention batch comm layout",
        "placement": "balance layout mesh comm convolution kernels.delta",
        "batch": "layout tiles mesh",
        "packing": "batch",
        "ring": "ring_keys ring_sums tiles batch lanes timing",
        "ring_keys": "tiles comm batch lanes",
        "ring_sums": "ring_keys tiles comm batch lanes timing",
        "attention": "ring head_chunks tiles comm batch",
        "head_chunks": "ring comm batch timing",
        "delta": "comm batch",
        "lightning": "delta kernels.ssd batch",
        "kda": "delta kernels.kda batch",
        "mamba1": "delta kernels.selective batch",
        "mamba2": "delta kernels.ssd kernels.delta batch",
        "tiled_head": "batch kernels.token_loss_cuda timing",
        "liger_head": "batch tiled_head",
        "kernels.token_loss_cuda": "",
        "replay": "",
        "offload": "",
        "tiled_module": "replay",
        "token_values": "batch tiled_head replay",
        "loss": "comm mesh",
        "router_loss": "comm batch",
        "deal": "batch",
        "loader": "comm batch mesh deal",
        "models": "batch attention delta loss",
        "planner": "config topology layout tiles",
        "planner.read": "planner checking models",
        "resolve": "config topology kernels.attention kernels.delta kernels.choice kernels.probe batch models",
        "table": "config layout kernels.choice batch mesh models profiling",
        "engine": "resolve table config topology comm factor preflight mesh kernels.choice batch loss loader models",
        "meter": "balance batch comm mesh models planner planner.read timing",
        "trainer": "engine",
        "trainer_checks": "",
        "trl_trainers": "engine config mesh models",
        "trl": "trainer",
        "selftest": "engine kernels.attention tiles batch models",
        "explain": "balance layout tiles",
        "checking": "balance config layout preflight topology models",
        "machines": "comm mesh tiles kernels.attention kernels.choice",
        "prove": "checking comm config engine factor launch machines mesh models placement preflight resolve selftest topology",
        "cli": "config planner selftest explain",
    }
)
"""The import table: a component (a module, or a folder) may import itself and these. What nothing here names is refused."""

BEYOND = _table(
    {
        "head_chunks": "topology reshard tiles kernels.attention",  # the head split; who receives which; Plan; Score
        # the head split; tokens not held in its order; Score; Window
        "attention": "topology reshard layout kernels.attention balance",
        "indexed": "topology",  # the head split
        "batch": "placement balance",  # what ranks hold; Window
        "delta": "topology reshard mesh layout",  # the head split; moving heads; the axis that shares them; the way there
        "mamba1": "topology",  # the head split
        "mamba2": "topology",
        "lightning": "reshard",  # moving heads
        "kda": "reshard",
        "ring": "kernels.merge kernels.sums kernels.attention",  # merging; what sums gradients; Score
        "ring_sums": "kernels.sums",  # what sums gradients
        "resolve": "balance",  # chunks, which no kernel is asked about
        "loader": "models",  # the mesh and the reduction of an engine's model
        "loss": "batch tiled_head",  # SequenceContext and IGNORE; what a token's loss is made of
        # windows and chunks; chosen keys, in tiles
        # same-row check; shapes of recurrent layers; tiles; Score; the balance loss; the one rank of a trial
        "models": "balance watch late comm mesh topology kernels.delta kernels.attention tiled_head liger_head token_values "
        "tiled_module offload router_loss convolution indexed layout mamba1 mamba2 lightning kda",
        # the public function; who is there; the process group; what ranks must have alike
        "engine": "token_values watch launch agreement meter profiling",
        "launch": "config agreement",  # a config that one rank cannot read, or reads otherwise, ends all of them
        # reads the block, counts targets and verifies the factor as engine does; stopping and saving
        "trainer": "batch comm config factor mesh deal reliable agreement launch preflight trl_trainers trainer_checks meter",
        "trl_trainers": "token_values",  # what TRL reads of a model
        "planner": "balance",  # the busiest rank's pairs of packed rows
        # names of layouts; what `check` resolves; what `selftest` runs; a model's counts
        "cli": "layout checking prove planner.read",
    }
)
"""Edges that the code has and design.md's table does not, each with its reason. One that is gone must go from here."""

OUTSIDE = _table(
    {
        "transformers": "models checking planner.read prove engine table meter trainer trainer_checks trl_trainers selftest "
        "reliable",
        "deepspeed": "mesh loss engine resolve trainer factor selftest launch prove",
        "flash_attn": "kernels.attention kernels.flash4_hopper",
        "cutlass": "kernels.flash4_hopper",
        "liger_kernel": "liger_head",
        "fla": "kernels kernels.attention kernels.delta",
        "trl": "trl",
        "triton": "kernels.token_loss_cuda kernels.merge_cuda kernels.blocked_cuda kernels.delta",
    }
)
"""Other packages, and the only components that may import them."""

INTEGERS_ONLY = ("config", "topology", "balance", "layout", "tiles", "planner")
"""Components without torch, so that the shell, the planner and one-process tests can ask for any rank."""

FILE_LINES = 400
FUNCTION_LINES = 60
CONTEXT_FIELDS = 10


# Reading the package


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> dict[str, Path]:
    """Dotted names below ds_cp and their files; the package itself is the empty name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
INNER = {name: path for name, path in MODULES.items() if name}  # without the front door, which imports on first use
every_module = pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(ROOT)))


def component_of(module: str) -> str:
    """The row of the table that a module belongs to: its longest listed prefix, else its own name."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in IMPORTS), module)


def imported(tree: ast.Module, package: str = "ds_cp") -> set[str]:
    """Absolute names of what a module imports, wherever it stands; `from a import b` gives a.b.

    Imports under TYPE_CHECKING are left out: they name a type and make no edge when the program runs.
    """
    names = set()
    for node in _run(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*package.split(".")[: len(package.split(".")) - node.level + 1], base]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    yield node
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"
    children = node.orelse if isinstance(node, ast.If) and typing_only else ast.iter_child_nodes(node)
    for child in children:
        yield from _run(child)


def inner_imports(module: str) -> set[str]:
    """Modules of ds_cp that a module imports; the empty name is the front door."""
    path = INNER[module]
    package = f"ds_cp.{module}" if path.name == "__init__.py" else f"ds_cp.{module}".rpartition(".")[0]
    found = set()
    for name in imported(parsed(path), package):
        if name.split(".")[0] != "ds_cp":
            continue
        parts = name.split(".")[1:]
        prefixes = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        found.add(next(prefix for prefix in prefixes if prefix in MODULES))  # from a module's attribute back to the module
    return found


def edges() -> set[tuple[str, str]]:
    """(component, component) pairs of the package."""
    pairs = {(component_of(module), component_of(name)) for module in INNER for name in inner_imports(module)}
    return {(source, target) for source, target in pairs if source != target}


# Imports go one way


def test_every_module_is_in_the_table() -> None:
    assert {component_of(module) for module in INNER} <= IMPORTS.keys()


def test_no_component_imports_what_the_table_does_not_give_it() -> None:
    given = {(source, target) for table in (IMPORTS, BEYOND) for source, targets in table.items() for target in targets}
    assert edges() - given == set()


def test_every_exception_to_the_table_is_still_needed() -> None:
    beyond = {(source, target) for source, targets in BEYOND.items() for target in targets}
    assert beyond <= edges()
    assert not any(target in IMPORTS[source] for source, target in beyond)


def test_the_table_has_no_cycle() -> None:
    order = list(TopologicalSorter({name: IMPORTS[name] | BEYOND.get(name, frozenset()) for name in IMPORTS}).static_order())
    assert sorted(order) == sorted(IMPORTS)


def test_no_module_imports_itself_through_others() -> None:
    order = list(TopologicalSorter({module: inner_imports(module) for module in INNER}).static_order())
    assert set(order) >= set(INNER)


def test_kernels_and_families_do_not_import_their_siblings() -> None:
    backends = {m for m in INNER if re.fullmatch(r"kernels\.(attention|delta)\.\w+|models\.family_\w+", m)}
    assert {"kernels.attention.reference", "models.family_dense"} <= backends
    assert {(module, name) for module in backends for name in inner_imports(module) if name in backends} == set()


@pytest.mark.parametrize("package", OUTSIDE)
def test_an_outside_package_is_imported_only_where_it_may_be(package: str) -> None:
    importing = {component_of(m) for m, path in INNER.items() if package in {n.split(".")[0] for n in imported(parsed(path))}}
    assert importing <= OUTSIDE[package]
    assert package not in {name.split(".")[0] for name in imported(parsed(MODULES[""]))}


def test_what_is_integers_only_does_not_import_torch() -> None:
    for module, path in INNER.items():
        if component_of(module) in INTEGERS_ONLY:
            assert "torch" not in {name.split(".")[0] for name in imported(parsed(path))}, module


def test_importing_the_package_loads_no_other_package() -> None:
    code = (
        "import sys; import ds_cp, ds_cp.topology, ds_cp.tiles, ds_cp.config; "
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'trl') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("import ds_cp.mesh as m", {"ds_cp.mesh"}),
        ("from ds_cp import batch as b, comm", {"ds_cp.batch", "ds_cp.comm"}),
        ("def f():\n    from ds_cp.mesh import Mesh", {"ds_cp.mesh.Mesh"}),
        ("if True:\n    import triton.language", {"triton.language"}),
        ("from . import b\nfrom .c import d", {"ds_cp.b", "ds_cp.c.d"}),
        ("try:\n    importlib.import_module('fla')\nexcept ImportError:\n    pass", {"fla"}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import fla", {"fla"}),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, wanted: set[str]) -> None:
    assert imported(ast.parse(source)) == wanted


# No mutable module state

MUTABLE_CALLS = re.compile(
    r"list|dict|set|bytearray|defaultdict|OrderedDict|Counter|deque|local|ContextVar|Weak(Key|Value)Dictionary|WeakSet|count|cycle"
)
MUTATORS = re.compile(r"append|appendleft|extend|insert|remove|pop|popitem|clear|update|setdefault|add|discard|sort|reverse")
MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
CONSTANT_ANNOTATION = re.compile(r"(typing\.)?(Final\[)?(Mapping|tuple|frozenset)\b")
PRIVATE_TABLE = re.compile(r"_[A-Z][A-Z0-9_]*")


def mutable_state(tree: ast.Module) -> list[str]:
    """What a module could remember between two calls, as 'line: code'."""
    found = [node for node in _outside_functions(tree) if _binds_mutable(node)]
    found += [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found += [d for f in functions for d in f.decorator_list if re.search(r"\b(lru_)?cache\b", ast.unparse(d))]
    shared = {name for node in _outside_functions(tree) for name in _bound(node)}
    found += [node for f in functions for node in _mutations(f, shared - _locals(f))]
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: in the module, its ifs and tries, and its classes; a function is one node."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _outside_functions(child)


def _binds_mutable(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) or node.value is None:
        return False
    targets = {ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    if targets == {"__all__"} or all(PRIVATE_TABLE.fullmatch(target) for target in targets):
        return False
    if isinstance(node, ast.AnnAssign) and CONSTANT_ANNOTATION.match(ast.unparse(node.annotation)):
        return False
    call = isinstance(node.value, ast.Call) and MUTABLE_CALLS.fullmatch(ast.unparse(node.value.func).split(".")[-1])
    return bool(call) or isinstance(node.value, MUTABLE_DISPLAYS)


def _bound(node: ast.AST) -> set[str]:
    """Names that a statement outside functions binds, by assignment, import or definition."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    return {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()


def _locals(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}


def _mutations(function: ast.FunctionDef | ast.AsyncFunctionDef, shared: set[str]) -> Iterator[ast.AST]:
    """Writes into a name of the module, of a class or of another library from inside a function."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            written = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and MUTATORS.fullmatch(node.func.attr):
            written = node.func.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            written = node.args[0]
        else:
            continue
        while isinstance(written, ast.Attribute | ast.Subscript):
            written = written.value
        if isinstance(written, ast.Name) and written.id in shared:
            yield node


PROCESS_WIDE = {
    "ds_cp/watch.py": ["sys.excepthook"],  # Python's door for an exception that nobody catches
    "ds_cp/launch.py": ["os.environ"],  # where DeepSpeed reads the address that mpirun's user gave
}
"""State of the whole process that a module sets, each with its reason."""


@every_module
def test_no_module_keeps_state(path: Path) -> None:
    found = [line.partition(": ")[2] for line in mutable_state(parsed(path))]
    assert found == PROCESS_WIDE.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    "source",
    [
        "seen = []",
        "CACHE: dict[str, int] = {}",
        "TABLE = {'a': 1}",
        "names = set()",
        "state = threading.local()",
        "calls = collections.Counter()",
        "if True:\n    seen = [1]",
        "try:\n    import a\nexcept ImportError:\n    seen = {}",
        "class A:\n    seen = []",
        "seen: Mapping[str, int] = {}\nseen += []\nmore = [x for x in y]",
        "n = 0\ndef f():\n    global n\n    n += 1",
        "@functools.cache\ndef f(x):\n    return x",
        "@lru_cache(maxsize=1)\ndef f(x):\n    return x",
        "_TABLE = {'a': 1}\ndef f():\n    _TABLE['b'] = 2",
        "_TABLE = {'a': 1}\ndef f():\n    _TABLE.update(b=2)",
        "_TABLE = {'a': [1]}\ndef f():\n    _TABLE['a'].append(2)",
        "_TABLE = {'a': 1}\ndef f():\n    del _TABLE['a']",
        "class A:\n    n = 0\n    def f(self):\n        A.n += 1",
        "import torch\ndef f(g):\n    torch.nn.functional.softmax = g",
        "import transformers as t\ndef f(g):\n    setattr(t.masking_utils, 'mask', g)",
        "def f():\n    f.calls = 1",
    ],
)
def test_state_is_seen(source: str) -> None:
    assert mutable_state(ast.parse(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "__all__ = ['a']",
        "_TABLE: dict[str, int] = {'a': 1}",
        "TABLE: Mapping[str, int] = {'a': 1}",
        "NAMES = ('a', 'b')",
        "KINDS = frozenset({'a'})",
        "def f(x):\n    seen = []\n    seen.append(x)\n    return seen",
        "import config\ndef f(config):\n    config['a'] = 1",
        "class A:\n    def f(self):\n        self.seen = []",
        "@dataclass\nclass A:\n    seen: list[int] = field(default_factory=list)",
    ],
)
def test_constants_and_locals_are_not_taken_for_state(source: str) -> None:
    assert mutable_state(ast.parse(source)) == []


# Size and shape


@every_module
def test_every_module_begins_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(parsed(path))


def test_files_stay_within_their_budget() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lines.items() if n > FILE_LINES and not name.startswith("kernels")} == {}


def test_functions_stay_within_their_budget() -> None:
    found = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in MODULES.items()
        if not name.startswith("kernels")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert found
    assert {name: n for name, n in found.items() if n > FUNCTION_LINES} == {}


def test_the_sequence_context_is_frozen_and_small() -> None:
    context = object.__new__(SequenceContext)
    fields = dataclasses.fields(SequenceContext)
    assert 0 < len(fields) <= CONTEXT_FIELDS
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(context, field.name, None)


def test_the_map_of_the_modules_names_every_module_and_no_other_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bds_cp/[\w/]+\.py\b", text))
    files = {str(path.relative_to(ROOT)) for path in PACKAGE.glob("*.py")} - {"ds_cp/__init__.py"}
    assert files <= named
    assert {path for path in named if not (ROOT / path).is_file()} == set()
