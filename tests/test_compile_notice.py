"""Compiling is said while it lasts."""

import jax
import jax.numpy as jnp
import pytest

from sva.parallel import compile_notice
from sva.parallel.compile_notice import Notice


@pytest.fixture
def listening():
    notice = Notice()
    jax.monitoring.register_event_duration_secs_listener(notice.listen)
    yield notice
    jax.monitoring.unregister_event_duration_listener(notice.listen)


def slow(x):
    for i in range(60):
        x = jnp.sin(x @ x + i)
    return x


def test_a_long_compilation_is_said_while_it_lasts_and_when_it_is_over(listening, monkeypatch, capsys):
    monkeypatch.setattr(compile_notice, "SECONDS", 0.001)
    jax.jit(slow).lower(jnp.ones((3, 3))).compile()
    shown = capsys.readouterr().err.splitlines()
    assert "sva: compiling slow: the first call is slow" in shown
    assert any(line.startswith("sva: compiled after") for line in shown)
    assert not listening._running


def test_a_short_compilation_is_not_mentioned(listening, capsys):
    jax.jit(lambda x: x + 41.5)(jnp.ones(7)).block_until_ready()
    assert capsys.readouterr().err == ""
    assert not any(timer.is_alive() for timer in listening._running.values())
