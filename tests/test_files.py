"""Files of arrays: what is read is what was written, by us and by others; what is broken or hostile says so."""

import collections
import functools
import io
import os
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.nnx
from jaxnorm.errors import ArgumentError
from jaxnorm.tools import unpickle

read, write = jn.tools.read, jn.tools.write
NESTED = {
    "params": {"bn": {"scale": np.arange(3, dtype=np.float32), "half": np.float16([1.5, 2.5])}},
    "batch_stats": {"bn": {"num_updates": np.int32(7), "wide": np.arange(6).reshape(2, 3).T}},
}
FLAT = {
    "params.bn.scale": NESTED["params"]["bn"]["scale"], "params.bn.half": NESTED["params"]["bn"]["half"],
    "batch_stats.bn.num_updates": NESTED["batch_stats"]["bn"]["num_updates"],
    "batch_stats.bn.wide": NESTED["batch_stats"]["bn"]["wide"],
}  # fmt: skip


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            same(actual[name], value)
        else:
            assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
            np.testing.assert_array_equal(actual[name], value, err_msg=name)


def need(suffix):
    """What writes such a file, or a skip."""
    for package in {".pth": ["torch"], ".safetensors": ["safetensors"]}.get(suffix, []):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".msgpack"])
def test_there_and_back(suffix, tmp_path):
    need(suffix)
    path = tmp_path / f"net{suffix}"
    write(path, {"old": np.ones(1)})
    write(path, jax.tree.map(jnp.asarray, NESTED) if suffix == ".npz" else NESTED)
    if suffix == ".npz":  # int64 was never JAX's
        same(read(path), FLAT | {"batch_stats.bn.wide": FLAT["batch_stats.bn.wide"].astype(np.int32)})
    else:
        same(read(path), NESTED if suffix == ".msgpack" else FLAT)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".msgpack", ".pth"])
def test_bfloat16(suffix, tmp_path):
    need(suffix)
    tree = {"scale": np.arange(4).astype(ml_dtypes.bfloat16)}
    write(tmp_path / f"net{suffix}", tree)
    same(read(tmp_path / f"net{suffix}"), tree)


def test_nnx_state(tmp_path):
    state = nnx.state(jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    write(tmp_path / "net.npz", state)
    write(tmp_path / "net.msgpack", state)
    for name in ("net.npz", "net.msgpack"):
        assert read(tmp_path / name).keys() == {"scale", "bias", "mean", "var"}


def test_orbax(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", NESTED)
        checkpointer.wait_until_finished()
    same(read(tmp_path / "model"), NESTED)
    (tmp_path / "1000").mkdir()
    (tmp_path / "model").rename(tmp_path / "1000" / "default")  # a step of a CheckpointManager
    same(read(tmp_path / "1000"), NESTED)


# --- torch's pickles


def program(*parts, tensors=(), path=None, compression=zipfile.ZIP_STORED):
    """A .pth file whose data.pkl is the parts, in a pickle's own operations; storages by number."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("net/data.pkl", b"\x80\x02" + b"".join(parts) + b".")
        for i, tensor in enumerate(tensors):
            archive.writestr(f"net/data/{i}", tensor.tobytes())
    return path


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def number(n):
    return b"\x8a\x08" + struct.pack("<q", n)  # LONG1


def ints(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind="FloatStorage", key="0", count=6):
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(offset, size, stride, **said):
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**said) + number(offset) + ints(*size) + ints(*stride)
        + b"\x89Nt" + b"R"
    )  # fmt: skip


SIX = np.arange(6, dtype=np.float32)


def test_a_pth_file_written_by_hand(tmp_path):
    """A slice of a transposed matrix: views of one storage."""
    path = program(b"}", text("w"), tensor(1, (2, 2), (1, 3)), b"s", path=tmp_path / "net.pth", tensors=[SIX])
    same(read(path), {"w": SIX.reshape(2, 3)[:, 1:].T})
    assert not read(path)["w"].flags.writeable


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pth_file_of_torch(zipped, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    matrix = torch.arange(6.0).reshape(2, 3)
    saved = collections.OrderedDict(
        matrix=matrix, transposed=matrix.t(), part=matrix[1:, ::2], wide=matrix.double().expand(4, 2, 3),
        parameter=torch.nn.Parameter(matrix[1]), count=torch.tensor(3), flags=torch.tensor([True, False]),
        half=torch.ones(2, dtype=torch.float16), brain=torch.ones(2, dtype=torch.bfloat16), empty=torch.zeros(0, 3),
        numbers={"epoch": 3, "rate": 0.1, "name": "net", "shape": matrix.shape, "list": [matrix, None]},
    )  # fmt: skip
    if zipped:
        saved["eighth"] = torch.ones(2).to(torch.float8_e4m3fn)
    torch.save(saved, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    found, plain = read(tmp_path / "net.pth"), saved.pop("numbers")
    more = found.pop("numbers")
    assert (type(found), more["shape"], more["list"][1]) == (dict, (2, 3), None)
    assert {name: more[name] for name in ("epoch", "rate", "name")} == {n: plain[n] for n in ("epoch", "rate", "name")}
    assert list(found) == list(saved)
    for name, value in saved.items():
        assert str(value.dtype).removeprefix("torch.") == found[name].dtype.name
        np.testing.assert_array_equal(found[name].astype(np.float64), value.detach().double().numpy())


def reduce(module, name, *arguments):
    return f"c{module}\n{name}\n(".encode() + b"".join(map(text, arguments)) + b"tR"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["os system", "builtins eval", "torch load", "numpy load", "collections Counter"])
def test_a_function_is_refused_by_name_and_not_called(name, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, function = name.split()
    attack = reduce(module, function, "touch called")
    path = tmp_path / "net.pth"
    if legacy:
        head = pickle.dumps(unpickle.MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
        path.write_bytes(head + b"\x80\x02" + attack + b".")
    else:
        program(attack, path=path)
    with pytest.raises(ArgumentError, match=f"'net.pth' cannot be read: it asks for {module}.{function}, which no"):
        read(path)
    assert os.listdir(tmp_path) == ["net.pth"]


def test_a_pickle_cannot_change_what_later_ones_get(tmp_path):
    """BUILD sets attributes on whatever is there: on the stand-ins it must fail."""
    for name in ("torch._utils\n_rebuild_tensor_v2", "torch\nSize", "torch\nFloatStorage"):
        state = b"}" + text("__doc__") + text("changed") + b"s"
        for build in (state + b"b", b"N" + state + b"\x86b"):  # __dict__, and what is in slots
            with pytest.raises(ArgumentError, match=r"is not a whole \.pth file: AttributeError"):
                read(program(f"c{name}\n".encode(), build, path=tmp_path / "net.pth"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([tensor(0, (7,), (1,))], "leaves its storage"),
        ([tensor(5, (2,), (1,))], "leaves its storage"),
        ([tensor(0, (2, 3), (4, 1))], "leaves its storage"),
        ([tensor(0, (2**40, 2), (1, 2**40))], "leaves its storage"),
        ([tensor(0, (2**44,), (0,))], "repeat its numbers to more than 1073"),
        ([tensor(0, (2**44, 2**44), (0, 0))], "not a whole .pth file"),
        ([tensor(0, (2,), (-1,))], "a tensor of size"),
        ([tensor(-1, (2,), (1,))], "a tensor of size"),
        ([tensor(0, (2,), (1, 1))], "a tensor of size"),
        ([tensor(0, (6,), (1,), count=9)], "cut off: 6 of 9"),
        ([tensor(0, (2,), (1,), kind="Size")], "a storage"),
        ([tensor(0, (2,), (1,), key="9")], "not a whole .pth file: KeyError"),
        ([b"ctorch._utils\n_rebuild_tensor_v2\n(", text("a"), ints(0), b"))tR"], "a tensor without a storage"),
        ([b"]q\x00h\x00a"], "not a whole .pth file: RecursionError"),
        ([text("a")[:-1]], "not a whole .pth file"),
    ],
)  # fmt: skip
def test_broken_tensors(parts, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        read(program(*parts, path=tmp_path / "net.pth", tensors=[SIX]))


def test_lists_that_hold_one_another(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "MOST", 1000)
    double = [b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(40)]
    with pytest.raises(ArgumentError, match="more than 1000 things"):
        read(program(b"]q\x00", *double, path=tmp_path / "net.pth"))


def test_broken_zip_files(tmp_path):
    with pytest.raises(ArgumentError, match="compressed"):
        read(program(b"}", path=tmp_path / "a.pth", compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("x", b"")
    with pytest.raises(ArgumentError, match=r"without torch's data\.pkl"):
        read(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps({}, 2))
        archive.writestr("net/byteorder", b"big")
    with pytest.raises(ArgumentError, match="high byte first"):
        read(tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(pickle.dumps([1, 2]) * 9)
    with pytest.raises(ArgumentError, match="it is not a torch file"):
        read(tmp_path / "d.pth")
    (tmp_path / "d.pth").write_bytes(b"hello world")
    with pytest.raises(ArgumentError, match=r"'d\.pth' cannot be read: it is not a torch file, or its end is missing"):
        read(tmp_path / "d.pth")


def legacy_bytes(claimed=6):
    parts = [unpickle.MAGIC, 1001, {"little_endian": True}]
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    body = b"\x80\x02}" + text("w") + tensor(0, (6,), (1,), count=claimed) + b"s."
    return head + body + pickle.dumps(["0"], 2) + struct.pack("<q", 6) + SIX.tobytes()


def test_one_tensor_many_times(tmp_path):
    """References take no room in the file, and all of it when they are copied."""
    wide = tensor(0, (2**24,), (0,)) + b"q\x00"
    program(b"]", b"(" + wide + b"h\x00" * 14 + b"e", path=tmp_path / "net.pth", tensors=[SIX])
    assert [value.shape for value in read(tmp_path / "net.pth")] == [(2**24,)] * 15
    program(b"]", b"(" + wide + b"h\x00" * 16 + b"e", path=tmp_path / "net.pth", tensors=[SIX])
    with pytest.raises(ArgumentError, match="repeat its numbers to more than"):
        read(tmp_path / "net.pth")


def test_legacy_files(tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes(legacy_bytes())
    same(read(path), {"w": SIX})
    path.write_bytes(legacy_bytes(claimed=7))
    with pytest.raises(ArgumentError, match="not of the size"):
        read(path)
    path.write_bytes(legacy_bytes(claimed=2**40))
    with pytest.raises(ArgumentError, match="larger than the file"):
        read(path)


# --- all formats


def contents(suffix, folder):
    """A whole file's bytes."""
    path = folder / f"whole{suffix}"
    if suffix == ".pth":
        path.write_bytes(legacy_bytes())
    elif suffix in (".h5", ".keras"):
        h5py = pytest.importorskip("h5py", reason="h5py is not installed")
        memory = io.BytesIO()
        with h5py.File(memory, "w") as file:
            group = file.create_group("layers/batch_normalization/vars")
            for i in range(4):
                group[str(i)] = np.full(3, i, np.float32)
        path.write_bytes(memory.getvalue())
        if suffix == ".keras":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("config.json", "{}")
                archive.writestr("model.weights.h5", memory.getvalue())
    elif suffix == ".onnx":
        onnx = pytest.importorskip("onnx", reason="onnx is not installed")
        held = onnx.numpy_helper.from_array(SIX, "w")
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "net", [], [], [held])), path)
    else:
        need(suffix)
        write(path, {"w": SIX})
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors", ".msgpack", ".h5", ".keras", ".onnx"])
def test_files_cut_off_or_of_something_else(suffix, tmp_path):
    """Whole, it reads; otherwise one line says which file it is and that it is broken."""
    data = contents(suffix, tmp_path)
    assert jax.tree.leaves(read(tmp_path / f"whole{suffix}"))
    path = tmp_path / f"net{suffix}"
    for broken in (b"", data[:9], data[: len(data) // 2], data[:-1] if suffix != ".h5" else b"", b"text\n" * 99):
        path.write_bytes(broken)
        with pytest.raises(ArgumentError, match=rf"^jaxnorm.tools.read: 'net\{suffix}' (is not a whole|cannot be)"):
            read(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: read(p / "net.pth"), "there is no file"),
        (lambda p: read(__file__), "'test_files.py' has none of the suffixes that can be read: .pth, .pt, .bin"),
        (lambda p: write(p / "net.keras", {}), "has none of the suffixes that can be written: .safetensors, .npz"),
        (lambda p: write(p / "net.npz", {"a": {"b": SIX}, "a.b": SIX}), "would both be called 'a.b'"),
        (lambda p: write(p / "net.npz", {"a": SIX.astype(ml_dtypes.bfloat16)}), "'a' is bfloat16, .*Use .safetensors"),
        (lambda p: write(p / "net.npz", {"a": np.array(["text"])}), "which .npz files cannot hold"),
        (lambda p: read(p), "orbax"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_errors(call, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        call(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    (tmp_path / "net.safetensors").write_bytes(b"")
    with pytest.raises(ArgumentError, match="needs safetensors: pip install safetensors"):
        read(tmp_path / "net.safetensors")


# --- without a template


def test_import_file(tmp_path):
    rng = np.random.default_rng(0)
    source = {
        "features.0.weight": rng.normal(size=(4, 3, 2, 2)), "features.0.bias": rng.normal(size=4),
        **{f"features.1.{n}": rng.random(4) for n in ("weight", "bias", "running_mean", "running_var")},
        "features.1.num_batches_tracked": np.array(5), "up.weight": rng.normal(size=(4, 2, 2, 2)),
        "words.weight": rng.normal(size=(7, 4)), "fc.weight": rng.normal(size=(2, 4)),
    }  # fmt: skip
    source = {name: value.astype(np.float32) if value.ndim else value for name, value in source.items()}
    write(tmp_path / "net.npz", source)
    run = functools.partial(jn.tools.import_file, tmp_path / "net.npz", embedding="words", transposed="up")
    report = run(tmp_path / "flax.msgpack")
    assert report.settings == {"momentum": 0.9, "epsilon": 1e-5, "unbiased": True, "debias": False}
    tree = read(tmp_path / "flax.msgpack")
    conv, up = source["features.0.weight"].transpose(2, 3, 1, 0), source["up.weight"].transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(tree["params"]["features"]["0"]["kernel"], conv)
    np.testing.assert_array_equal(tree["params"]["up"]["kernel"], up[::-1, ::-1])
    np.testing.assert_array_equal(tree["params"]["words"]["embedding"], source["words.weight"])
    np.testing.assert_array_equal(tree["params"]["fc"]["kernel"], source["fc.weight"].T)
    assert tree["batch_stats"]["features"]["1"].keys() == {"mean", "var"}
    np.testing.assert_array_equal(tree["batch_stats"]["features"]["1"]["var"], source["features.1.running_var"])

    run(tmp_path / "cumulative.msgpack", settings={"momentum": None}, where="features/1")
    tree = read(tmp_path / "cumulative.msgpack")
    assert (tree["params"].keys(), int(tree["batch_stats"]["features"]["1"]["num_updates"])) == ({"features"}, 5)

    jn.tools.import_file(tmp_path / "flax.msgpack", tmp_path / "back.npz", to="torch", transposed="up")
    back = read(tmp_path / "back.npz")
    same(back, source | {"features.1.num_batches_tracked": np.array(0)})  # which Flax does not keep
    with pytest.raises(ArgumentError, match=r"jaxnorm\.tools\.import_file: embedding='table' matches no layer"):
        run(tmp_path / "other.npz", embedding="table")


def test_import_of_a_training_checkpoint(tmp_path):
    """Adam's moments have the names and shapes of parameters, and are none."""
    from flax import serialization

    norm = {name: np.full(3, i, np.float32) for i, name in enumerate(("weight", "bias", "running_mean", "running_var"))}
    saved = {"model": {"bn": norm}, "optimizer": {"state": {"0": {"exp_avg": norm["bias"], "weight": norm["bias"]}}}}
    (tmp_path / "net.msgpack").write_bytes(serialization.msgpack_serialize(saved))
    report = jn.tools.import_file(tmp_path / "net.msgpack", tmp_path / "out.npz")
    assert report.title == "1 layer of torch into flax, 1 norm, of 'model', without 'optimizer'"
    same(read(tmp_path / "out.npz"), {
        "params.bn.scale": norm["weight"], "params.bn.bias": norm["bias"],
        "batch_stats.bn.mean": norm["running_mean"], "batch_stats.bn.var": norm["running_var"],
    })  # fmt: skip
