import io

import pytest

from sva.utils.jsonl import Prompt, read_prompts

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "jsonl"),
    [
        (b"Hi.\n\nHow much?\n", False),
        (MARK + b"Hi.\r\n\r\nHow much?\r\n", False),
        (b'{"prompt": "Hi."}\n\n{"prompt": "How much?"}\n', True),
        (MARK + b'{"prompt": "Hi."}\r\n\r\n' + MARK + b'{"prompt": "How much?"}', True),
    ],
)
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(content, jsonl):
    prompts, faults = read_prompts(io.BytesIO(content), "it", jsonl=jsonl)
    assert (prompts, faults) == ([Prompt(1, "Hi."), Prompt(3, "How much?")], [])


def test_a_line_in_another_encoding_is_a_fault_of_its_own():
    content = "Hi.\nWie schön\n".encode("latin-1") + b"Bye.\n"
    prompts, faults = read_prompts(io.BytesIO(content), "it", jsonl=False)
    assert [prompt.text for prompt in prompts] == ["Hi.", "Bye."]
    assert faults == ["it line 2 is not UTF-8 (byte 8); save the file as UTF-8"]
    _, faults = read_prompts(io.BytesIO("Hi.".encode("utf-16")), "it", jsonl=False)
    assert faults == ["it line 1 is not UTF-8 (byte 1); save the file as UTF-8"]
