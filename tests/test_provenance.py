"""Where results say that they come from."""

import subprocess
import sys
from pathlib import Path

from sva.utils import provenance

ROOT = Path(__file__).parent.parent
SAY = "from sva.utils.provenance import command; print(command())"


def said(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_a_command_is_said_as_it_is_given_at_the_root_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.delattr(sys.modules["__main__"], "__spec__", raising=False)
    for program, words in {
        ROOT / "experiments" / "benchmarks" / "x.py": "python experiments/benchmarks/x.py --a 1",
        ROOT / ".venv" / "bin" / "sva": "sva --a 1",
        tmp_path / "mine.py": "mine.py --a 1",
    }.items():
        monkeypatch.setattr(sys, "argv", [str(program), "--a", "1"])
        assert provenance.command() == words


def test_a_modules_command_names_the_module(tmp_path):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__main__.py").write_text(SAY)
    (tmp_path / "tool" / "part.py").write_text(SAY)
    path = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['x', '--a']; "
    for module, words in {"tool": "python -m tool --a", "tool.part": "python -m tool.part --a"}.items():
        run = f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        assert said("-c", path + run) == words
