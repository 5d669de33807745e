"""The promises of the folders and of the README."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [path for folder in ("platform", "jobs", "serve") for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_IN_PLATFORM = {"ray", "vllm", "fastapi", "starlette", "uvicorn", "httpx", "requests", "aiohttp"}


def imports(path: Path) -> set[str]:
    """First names of all modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_platform_is_a_source_folder_and_no_package():
    """An `__init__.py` there would hide Python's own `platform`."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    run = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.machine())"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0
    assert run.stdout.strip()


@pytest.mark.parametrize("path", sorted((ROOT / "platform").rglob("*.py")), ids=lambda path: path.name)
def test_platform_knows_no_ray_no_vllm_and_no_http(path):
    assert not imports(path) & NOT_IN_PLATFORM


@pytest.mark.parametrize("folder", ["jobs", "serve", "tests", "platform/disranker"])
def test_no_file_hides_a_standard_module(folder):
    assert not {path.stem for path in (ROOT / folder).glob("*.py")} & set(sys.stdlib_module_names) - {"__init__"}


def test_importing_any_module_does_nothing(tmp_path):
    """No output, no file, no Ray, no changed environment, no thread."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("platform.") for path in CODE]
    modules = [name.removesuffix(".__init__") for name in modules]
    program = (
        "import importlib, os, sys, threading\n"
        "before = dict(os.environ), threading.active_count()\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "changed = {k for k in os.environ if os.environ[k] != before[0].get(k)}\n"
        "print(sorted(k for k in changed if not k.startswith(('KMP_', 'RAY_', 'TORCH', 'PYTORCH', '_RJEM'))))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"
    assert not list(tmp_path.iterdir())


def environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_paths_and_links_of_a_page_exist(page):
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    named = re.findall(r"`((?:platform|jobs|serve|tests|recipes|docs|bench|deploy)/[\w./-]+)`", text)
    missing = [path for path in linked if not (page.parent / path).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_jobs_targets_and_recipes_that_a_page_names_exist(page):
    text = page.read_text()
    jobs = set(re.findall(r"python -m jobs\.(\w+)", text))
    assert not [job for job in jobs if not (ROOT / "jobs" / f"{job}.py").exists()]
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE)) | set(re.findall(r"`make (\w+)`", text))
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= rules


@pytest.mark.parametrize("name", ["pipeline", "demo", "ingest", "score", "forget", "export", "compare", "refresh"])
def test_a_job_answers_to_help(name, capsys, monkeypatch):
    """As `python -m` runs it, without the seconds that another Python takes to import Ray."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"jobs.{name}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"jobs.{name}", run_name="__main__")
    assert end.value.code == 0 and ("ROOT_A" if name == "compare" else "--recipe") in capsys.readouterr().out


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_under_60_lines_and_files_under_400(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 60]


def test_no_tracked_file_is_larger_than_1_mb():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout: nothing is tracked")
    files = [ROOT / name for name in run.stdout.split("\0") if name]
    assert not [path.name for path in files if path.exists() and path.stat().st_size > 1_000_000]


def test_cluster_yaml_fits_rays_own_schema():
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))
