import pytest

from sva.serving.config import ServerConfig, read_token
from sva.utils.errors import UserError


def test_a_token_is_read_from_a_file_of_ones_own(tmp_path):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    assert read_token(file) == "0123456789abcdef"
    for mode in (0o640, 0o604, 0o660):
        file.chmod(mode)
        with pytest.raises(UserError, match="can be read by others; run chmod 600"):
            read_token(file)


@pytest.mark.parametrize("text", ["", "short", "with a space inside it", "é" * 20])
def test_a_token_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UserError, match=r"token of at least 16|not ASCII"):
        read_token(file)


def test_a_token_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(port=70000), "--port"),
        (dict(context=1), "--context"),
        (dict(max_tokens=0), "--max-tokens"),
        (dict(timeout=0.0), "--timeout"),
    ],
)
def test_settings_that_make_no_sense_are_told(settings, words):
    with pytest.raises(UserError, match=words):
        ServerConfig(**settings)


def test_loopback_is_the_default_and_known():
    assert ServerConfig().is_loopback
    assert ServerConfig(host="127.0.0.2").is_loopback
    assert not ServerConfig(host="0.0.0.0").is_loopback
    assert "named" in ServerConfig(allowed_hosts=("Named",)).hosts
