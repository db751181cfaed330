"""Nothing here runs what it reads: no pickle from a file, no shell, no code from a model's repository, in ds_cp and in scripts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def programs() -> list[Path]:
    """Every Python file of the package and of scripts/, also those without a suffix."""
    found = [*ROOT.glob("ds_cp/**/*.py"), *ROOT.glob("scripts/**/*.py")]
    bare = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix]
    return sorted(found + [path for path in bare if "python" in path.read_text(encoding="utf-8").split("\n", 1)[0]])


def unsafe(source: str) -> list[str]:
    """Calls that would run what is in a file, an argument or an environment variable."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen") or name.split(".")[0] in ("pickle", "dill", "marshal", "shelve"):
            found.append(name)
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{name} without weights_only")
        if keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False":
            found.append(f"{name} with a shell or pickles")
        if keywords.get("trust_remote_code", "False") != "False":
            found.append(f"{name} with trust_remote_code")
    shells = [node for node in ast.walk(ast.parse(source)) if _is_shell(node)]
    return found + [f"line {node.lineno}: text put into a shell's command" for node in shells]


def _is_shell(node: ast.AST) -> bool:
    """[..., "sh", "-c", what], where what is not a constant."""
    if not isinstance(node, ast.List):
        return False
    words = [word.value if isinstance(word, ast.Constant) else None for word in node.elts]
    return any(a in ("sh", "bash") and b == "-c" and c is None for a, b, c in zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("path", programs(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "subprocess.run(f'ssh {host}', shell=True)",
        "os.system('ls ' + host)",
        "subprocess.run(['ssh', host, 'sh', '-c', f'cd {folder}'])",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_it_is_seen(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "subprocess.run(['ssh', host, command])",
        "subprocess.run(['sh', '-c', 'hostname \"$0\"', host])",
        "json.loads(text)",
        "model.eval()",
    ],
)
def test_what_is_safe_is_not_taken_for_it(source: str) -> None:
    assert unsafe(source) == []
