import builtins
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from sva.interop.torch_files import read_tensors
from sva.utils.errors import UserError


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    assert str(path) in text
    return text


def archive(path, program, storages=(), **entries):
    """A file as torch writes it, with a data.pkl of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program)
        for key, data in enumerate(storages):
            file.writestr(f"x/data/{key}", data)
        for name, data in entries.items():
            file.writestr(f"x/{name}", data)
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def one_tensor(*, count=4, offset=0, shape=(4,), strides=(1,), storage="FloatStorage", key="0"):
    """The pickle of {"a": tensor}, any of its numbers as one likes."""

    def number(value):
        data = pickle.encode_long(value)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    reference = (
        b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    )
    rest = number(offset) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + rest + b"tR"
    return b"\x80\x02}" + text("a") + tensor + b"s."


FOUR = np.arange(4, dtype="<f4").tobytes()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_torch_saved_is_read_as_torch_reads_it(dtype, protocol, tmp_path):
    base = torch.randn(6, 5).to(dtype)
    module = nn.Module()
    module.things = nn.ParameterList([torch.randn(7).to(dtype), torch.randn(2, 3).to(dtype)])
    trained = nn.Parameter(torch.randn(3).to(dtype))
    given = {"view": base[1:5:2, 1:].T, "scalar": torch.tensor(2.0, dtype=dtype), "p": trained, "made": trained * 2}
    for saved in (given, module.state_dict()):
        torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol)
        found = read_tensors(tmp_path / "x.pt")
        assert list(found) == list(saved)
        for name, tensor in saved.items():
            np.testing.assert_array_equal(found[name].array.astype("f8"), tensor.detach().double().numpy())
            assert found[name].is_parameter == isinstance(tensor, nn.Parameter)
            assert found[name].requires_grad == tensor.requires_grad


def test_a_file_of_a_big_endian_machine_is_read(tmp_path):
    data = np.arange(4, dtype=">f4").tobytes()
    path = archive(tmp_path / "x.pt", one_tensor(), [data], byteorder="big")
    np.testing.assert_array_equal(read_tensors(path)["a"].array, np.arange(4))
    path = archive(tmp_path / "x.pt", one_tensor(), [FOUR])  # older files do not say; they are little-endian
    np.testing.assert_array_equal(read_tensors(path)["a"].array, np.arange(4))


class Runs:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda mark: {"a": Runs(os.system, f"touch {mark}")}, "asks for posix.system"),
        (lambda mark: {"a": Runs(builtins.eval, f"open({mark!r}, 'w')")}, "asks for __builtin__.eval"),
        (lambda mark: Runs(builtins.exec, f"open({mark!r}, 'w')"), "asks for __builtin__.exec"),
        (lambda mark: {"a": Runs(getattr, "text", "upper")}, "asks for __builtin__.getattr"),
        # the hostile call hides in the arguments of calls that are known
        (
            lambda mark: Runs(torch._utils._rebuild_parameter, Runs(os.system, f"touch {mark}"), True, {}),
            "asks for posix.system",
        ),
        (lambda mark: {Runs(os.system, f"touch {mark}"): torch.ones(2)}, "asks for posix.system"),
        (lambda mark: {"a": torch.ones(2), "optimizer": {"lr": 0.1}}, "instruction BINFLOAT"),
        (lambda mark: nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
        (lambda mark: torch.ones(2), "it holds a single tensor"),
        (lambda mark: {}, "it holds a dictionary, not a dictionary of tensors"),
        (lambda mark: {"a": torch.ones(2), "b": "text"}, "b is text, not a tensor"),
        (lambda mark: {"a": {"b": torch.ones(2)}}, "a is a dictionary, not a tensor"),
        (lambda mark: {"a": [torch.ones(2)]}, "instruction EMPTY_LIST"),
        (lambda mark: {"a": torch.ones(2, dtype=torch.int64)}, "asks for torch.LongStorage"),
        (lambda mark: {0: torch.ones(2)}, "has a plain value as a key"),
    ],
)
def test_anything_but_named_tensors_is_refused_and_nothing_is_run(value, words, tmp_path):
    mark = str(tmp_path / "mark")
    torch.save(value(mark), tmp_path / "x.pt")
    assert words in refusal(tmp_path / "x.pt").replace("nt.system", "posix.system")
    assert not os.path.exists(mark)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"(S'touch mark'\nios\nsystem\n.", "instruction STRING"),
        (b"(ios\nsystem\n.", "instruction INST"),
        (b"(cos\nsystem\no.", "os.system"),
        (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (b"\x82\x01.", "instruction EXT1"),
        (b"cos\nsystem\n" + text("true") + b"\x85R.", "os.system"),
        (b"\x80\x04" + text("os") + text("system") + b"\x93)R.", "os.system"),
        (b"\x80\x04)K\x01\x93.", "damaged"),
        (b"ccollections\nOrderedDict\nN}" + text("__call__") + b"K\x01s\x86b.", "sets attributes"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__defaults__") + b"K\x01sb.", "sets attributes"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "calls something in a way"),
        (b"ctorch._utils\n_rebuild_parameter\n)R.", "calls something in a way"),
        (b"ctorch\nFloatStorage\n)R.", "calls something in a way"),
        (b"ccollections\nOrderedDict\n.", "it holds the name collections.OrderedDict"),
        (text("id") + b"Q.", "something outside itself"),
        (b"Pother\n.", "instruction PERSID"),
        (b"c" + b"a" * 5000 + b"\nb\n.", "aaa..."),
        (b"cos\\l\nsystem\n.", "system"),
        (b"c\x1b[31m\nred\n.", r"\x1b[31m.red"),
        (b"}K\x01K\x02s.", "as a key"),
        (b"}))s.", "a tuple as a key"),
        (b"K\x01" + text("a") + b"Ns.", "damaged"),
        (b"h\x07.", "damaged"),
        (b"R.", "damaged"),
        (b".", "damaged"),
        (b"t.", "damaged"),
        (b"\xff", "damaged"),
        (b"}", "damaged"),
        (b"", "damaged"),
        (b"X\xff\xff\xff\xff", "damaged"),
        (b"\x8b\xff\xff\xff\x7f", "damaged"),
    ],
)
def test_a_pickle_made_by_hand_is_refused(program, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(archive(tmp_path / "x.pt", program))
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (5,)}, "larger than its storage"),
        ({"shape": (2**40,), "strides": (0,)}, "larger than its storage"),
        ({"shape": (2**200, 0), "strides": (1, 1)}, "larger than its storage"),
        ({"shape": (0,), "strides": (2**200,)}, "damaged"),
        ({"shape": (1,) * 70, "strides": (1,) * 70}, "damaged"),
        ({"shape": (2,), "strides": (4,)}, "ends at number 4"),
        ({"offset": 1}, "ends at number 4"),
        ({"offset": -1}, "are not sizes"),
        ({"shape": (-1,)}, "are not sizes"),
        ({"strides": (-1,)}, "are not sizes"),
        ({"strides": (1, 1)}, "are not sizes"),
        ({"count": 5}, "holds 4 float32 numbers, not 5"),
        ({"count": 2**60}, "holds 4 float32 numbers"),
        ({"storage": "DoubleStorage"}, "holds 2 float64 numbers, not 4"),
        ({"storage": "UntypedStorage"}, "torch.UntypedStorage"),
        ({"key": "../data.pkl"}, "is missing"),
        ({"key": "7"}, "is missing"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(changes, words, tmp_path):
    assert words in refusal(archive(tmp_path / "x.pt", one_tensor(**changes), [FOUR]))


def test_compressed_entries_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", one_tensor(count=1 << 22, shape=(1 << 22,)), zipfile.ZIP_STORED)
        file.writestr("x/data/0", bytes(4 << 22))
    assert "compressed" in refusal(tmp_path / "x.pt")


def test_a_small_program_cannot_ask_for_much_memory(tmp_path):
    # a tuple of itself sixty times over as a key, which hashing would walk through; a memo entry far out
    for program in (
        b"}" + b")" + b"2\x86" * 60 + b"Ns.",
        b"})" + b"q\x01h\x01h\x01\x86" * 60 + b"Ns.",
        b"}"
        + b")"
        + b"\x85" * 1_000_000
        + b"Ns.",  # nested a million times, which hashing would follow down the C stack
        b"}(" + b")" + b"q\x01h\x01h\x01\x86" * 60 + b"Nu.",
        b"ccollections\nOrderedDict\n)R)" + b"q\x01h\x01h\x01\x86" * 60 + b"Ns.",
        b"\x80\x04)" + b"\x94h\x00\x86" * 60 + b"}" + b"h\x00Ns.",
        b"}r\xff\xff\xff\x7f.",
    ):
        refusal(archive(tmp_path / "x.pt", program))


def test_a_truncated_or_changed_file_is_one_line(tmp_path):
    torch.save({f"w{i}": nn.Parameter(torch.randn(8).bfloat16()) for i in range(3)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "x.pt"
    for end in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:end])
        refusal(path)
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(400):
        changed = bytearray(whole)
        changed[int(rng.integers(len(whole)))] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            read_tensors(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 100  # a changed number of padding or of a date does no harm
    assert not [message for message in messages if "\n" in message]


def test_files_of_other_kinds_are_named(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "none.pt")
    assert "cannot be read" in refusal(tmp_path)
    path = tmp_path / "x.pt"
    path.write_bytes(b"hello")
    assert "not a file that torch.save wrote" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "not a file that torch.save wrote" in refusal(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "from before 1.6" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "hello")
    assert "without data.pkl" in refusal(path)
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    path.write_bytes(buffer.getvalue())
    assert "without data.pkl" in refusal(path)
