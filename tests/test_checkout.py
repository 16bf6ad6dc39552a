"""What a page says about the sources that it was made with."""

import shutil
import subprocess
import sys

import pytest

from kimi_ops.testing import checkout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not in the path")
    monkeypatch.setattr(checkout, "ROOT", tmp_path)

    def git(*arguments):
        named = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *named, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.py").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return git


def test_the_commit_and_what_differs_from_it(repository, tmp_path):
    commit = repository("rev-parse", "--short=10", "HEAD").strip()
    assert checkout.commit_of("kernels") == f"commit {commit}"
    (tmp_path / "other.py").write_text("2\n")
    assert checkout.commit_of("kernels") == f"commit {commit}"
    (tmp_path / "kernels" / "one.py").write_text("2\n")
    assert checkout.commit_of("kernels") == f"commit {commit} with changes in `kernels/one.py`"


def test_without_a_checkout_or_git_the_commit_is_unknown(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", tmp_path / "kernels")  # installed inside of another one
    assert checkout.commit_of("kernels") == "unknown commit"
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout.commit_of("kernels") == "unknown commit"


def test_compile_without_triton_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from kimi_ops.cli import main\n"
        "sys.exit(main(['compile', '--op', 'rms_norm', '--markdown', 'none.md']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "kimi-ops compile: triton is not installed: pip install triton\n"
