import os
import signal
import subprocess
import sys

import pytest

from sva.parallel.supervise import INSIDE, supervise


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "exit_code"), [("", 0), ("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_childs_exit_code_is_the_commands(code, exit_code, capfd):
    assert supervise(python(code)) == exit_code
    assert capfd.readouterr() == ("", "")


def test_a_child_that_the_runtime_aborts_is_told_of_in_one_line(capfd):
    assert supervise(python("import os; os.abort()")) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "another one of the run was lost; start the same command again" in line


def test_the_child_knows_that_it_is_one(capfd):
    assert INSIDE not in os.environ
    supervise(python(f"import os; print(os.environ['{INSIDE}'])"))
    assert capfd.readouterr().out == "1\n"


def test_a_signal_to_end_goes_to_the_child():
    child = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    supervised = f"sys.exit(supervise([sys.executable, '-c', {child!r}]))"
    parent = f"from sva.parallel.supervise import supervise; import sys; {supervised}"
    process = subprocess.Popen(python(parent), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 7
    process.stdout.close()
