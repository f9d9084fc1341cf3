"""Files of arrays: read what other libraries wrote, and write. The suffix says the format."""

import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxnorm.errors import ArgumentError, named
from jaxnorm.errors import _Error as Ours
from jaxnorm.tools import unpickle
from jaxnorm.tools.find import natural

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A file's arrays, whose they are (None: their names say it), and what it says of its layers, by path."""

    tree: Any
    framework: str | None = None
    settings: Settings = field(default_factory=dict)


@named
def read(path: str | os.PathLike) -> Any:
    """The arrays in a file, as a tree of NumPy arrays.

        tree[name] = array,   by the names that the file has

    | suffix | what | needs |
    |---|---|---|
    | .pth .pt .bin | torch.save, of any age; read without torch | |
    | .safetensors .npz | a flat dict | safetensors for the first |
    | .msgpack | flax.serialization.to_bytes | flax |
    | .keras .h5 .hdf5 .weights.h5 | Keras: a flat dict of `layer/gamma` | h5py |
    | .onnx | a flat dict of `layer.weight`, in torch's names and layouts | onnx |
    | a folder | orbax's StandardCheckpointer, or a CheckpointManager's of one step and item | orbax-checkpoint |

    Args:
        path: of the file.

    Returns:
        A dict, flat or nested, as it was saved.

    Raises:
        ArgumentError: when there is no such file or it is not what its suffix says; when a .pth file asks for a
            function (it is not called); when the variables of a Keras file without names could be two things.

    Example:
        >>> import os, tempfile, numpy as np, jaxnorm as jn
        >>> path = os.path.join(tempfile.mkdtemp(), "bn.npz")
        >>> jn.tools.write(path, {"bn": {"scale": np.ones(3), "bias": np.zeros(3)}})
        >>> sorted(jn.tools.read(path)), jn.tools.read(path)["bn.scale"].tolist()
        (['bn.bias', 'bn.scale'], [1.0, 1.0, 1.0])

    Source: the formats of torch 2.13 (and before 1.6), safetensors 0.8, Keras 3.15, ONNX 1.23, flax 0.12.

    Differs from: torch.load, which runs what a pickle says unless weights_only=True.
    """
    return load(path).tree


@named
def write(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of arrays into a file.

        name = the keys of the path, joined by "."       in formats that have no nesting

    Args:
        path: ends in .safetensors or .npz (flat), .msgpack (nested, flax's), .pth or .pt (torch, which must be
            installed). An existing file is replaced when the new one is complete.
        tree: nested dicts of arrays, an nnx.State, or a flat dict.

    Returns:
        None.

    Raises:
        ArgumentError: for another suffix, when two names become one, or when the format lacks the dtype.

    Example:
        >>> import os, tempfile, numpy as np, jaxnorm as jn
        >>> path = os.path.join(tempfile.mkdtemp(), "bn.msgpack")
        >>> jn.tools.write(path, {"bn": {"scale": np.arange(3)}})
        >>> jn.tools.read(path)["bn"]["scale"].tolist()
        [0, 1, 2]

    Source: safetensors 0.8, NumPy 2, flax 0.12 and torch 2.13.

    Differs from: torch.save, which writes any Python object; this writes arrays.
    """
    path = _path(path)
    if not path.parent.is_dir():
        raise ArgumentError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}.")
    if path.suffix not in WRITERS:
        raise ArgumentError(f"{path.name!r} has none of the suffixes that can be written: {', '.join(WRITERS)}.")
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        WRITERS[path.suffix](part, tree)
        part.replace(path)
    except (Ours, OSError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ArgumentError(f"a {path.suffix} file cannot hold this tree: {type(error).__name__} {text}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> Checkpoint:
    """As `read`, with what the file says beside its arrays."""
    path = _path(path)
    if not path.exists():
        raise ArgumentError(f"there is no file {str(path)!r}.")
    suffix = "" if path.is_dir() else path.suffix
    if suffix not in READERS:
        known = ", ".join(filter(None, READERS))
        raise ArgumentError(f"{path.name!r} has none of the suffixes that can be read: {known}.")
    try:
        return READERS[suffix](path)
    except Ours as error:
        raise ArgumentError(f"{path.name!r} cannot be read: {error.text}") from None
    except ImportError:
        raise
    except Exception as error:  # what the readers raise for a broken file is theirs, and of every kind
        text = " ".join(str(error).split())[:200]
        what = suffix or "orbax"
        raise ArgumentError(f"{path.name!r} is not a whole {what} file: {type(error).__name__} {text}") from error


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise ArgumentError(f"a path is needed, got {type(path).__name__}.") from None


def need(module: str, package: str) -> Any:
    """An optional package, or how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ArgumentError(f"this format needs {package}: pip install {package}") from None


def flat(tree: Any) -> dict[str, np.ndarray]:
    """A tree as a dict of names."""
    out: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [k for i, k in enumerate(path) if not (i and isinstance(k, jax.tree_util.GetAttrKey))]  # .value of nnx
        name = ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys)
        if not path:
            raise ArgumentError("a tree of named arrays is needed, got one array.")
        if name in out:
            raise ArgumentError(f"two arrays would both be called {name!r}.")
        out[name] = array(leaf)
    return out


def array(leaf: Any) -> np.ndarray:
    """NumPy's view of an array of any library."""
    if type(leaf).__module__.startswith("torch"):
        leaf = leaf.detach().cpu().contiguous()
        if str(leaf.dtype) == "torch.bfloat16":  # NumPy's protocol does not know it
            import ml_dtypes

            return leaf.view(import_module("torch").int16).numpy().view(ml_dtypes.bfloat16)
        return leaf.numpy()
    return np.asarray(leaf)


def _msgpack(path: Path) -> Checkpoint:
    return Checkpoint(need("flax.serialization", "flax").msgpack_restore(path.read_bytes()))


def _npz(path: Path) -> Checkpoint:
    zipfile.ZipFile(path).close()  # np.load would take what is no zip file for a pickle
    with np.load(path, allow_pickle=False) as file:
        tree = {name: file[name] for name in file.files}
    for name, value in tree.items():
        _npz_can_hold(name, value)
    return Checkpoint(tree)


def _npz_can_hold(name: str, value: np.ndarray) -> None:
    if value.dtype.kind not in "biufc":
        raise ArgumentError(f"{name!r} is {value.dtype}, which .npz files cannot hold. Use .safetensors.")


def _safetensors(path: Path) -> Checkpoint:
    return Checkpoint(dict(need("safetensors.numpy", "safetensors").load_file(path)))


def _orbax(path: Path) -> Checkpoint:
    path = _orbax_tree(path)
    with need("orbax.checkpoint", "orbax-checkpoint").StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path.absolute())
    return Checkpoint(jax.tree.map(np.asarray, tree))


def _orbax_tree(path: Path) -> Path:
    """The folder of a tree: this one or the only one in it, as the one step or the one item of a CheckpointManager."""
    marks = ("_METADATA", "checkpoint")  # the second is older
    if any((path / mark).is_file() for mark in marks):
        return path
    if (path / "default").is_dir():  # what a CheckpointManager has no other name for
        return path / "default"
    inside = [z for z in path.iterdir() if z.is_dir() and any(any(z.glob(g)) for m in marks for g in (m, f"*/{m}"))]
    if len(inside) == 1:
        return _orbax_tree(inside[0])
    names = sorted((z.name for z in inside or path.iterdir()), key=natural)
    if inside:
        raise ArgumentError(f"it holds {', '.join(names[:8])}{', ...' * (len(names) > 8)}: name one.")
    raise ArgumentError(f"no checkpoint of orbax: it holds {', '.join(names[:8]) or 'nothing'}.")


def _keras(path: Path) -> Checkpoint:
    from jaxnorm.tools.files_keras import keras_file

    return Checkpoint(*keras_file(path))


def _onnx(path: Path) -> Checkpoint:
    from jaxnorm.tools.files_onnx import onnx_file

    return Checkpoint(*onnx_file(path))


def _write_safetensors(path: Path, tree: Any) -> None:
    values = {name: np.array(value, order="C") for name, value in flat(tree).items()}
    need("safetensors.numpy", "safetensors").save_file(values, path)


def _write_npz(path: Path, tree: Any) -> None:
    values = flat(tree)
    for name, value in values.items():
        _npz_can_hold(name, value)
    with zipfile.ZipFile(path, "w") as archive:  # np.savez cannot take a name such as "file"
        for name, value in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, value, allow_pickle=False)


def _write_msgpack(path: Path, tree: Any) -> None:
    path.write_bytes(need("flax.serialization", "flax").to_bytes(_nested(tree)))


def _nested(tree: Any) -> Any:
    """Dicts of NumPy arrays: of an nnx.State too, without what it says beside them."""
    if isinstance(tree, Mapping):
        return {str(key): _nested(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return {str(key): _nested(value) for key, value in enumerate(tree)}
    leaves = jax.tree.leaves(tree)
    return array(leaves[0]) if len(leaves) == 1 else tree


def _write_torch(path: Path, tree: Any) -> None:
    torch = need("torch", "torch")
    torch.save({name: tensor(value) for name, value in flat(tree).items()}, path)


def tensor(value: np.ndarray) -> Any:
    """torch's copy of a NumPy array."""
    torch = need("torch", "torch")
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(value, order="C").view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(value, order="C"))


def _torch(path: Path) -> Checkpoint:
    return Checkpoint(unpickle.torch_file(path), "torch")


READERS: dict[str, Callable[[Path], Checkpoint]] = {
    ".pth": _torch, ".pt": _torch, ".bin": _torch, ".safetensors": _safetensors, ".npz": _npz, ".msgpack": _msgpack,
    ".keras": _keras, ".h5": _keras, ".hdf5": _keras, ".onnx": _onnx, "": _orbax,
}  # fmt: skip
WRITERS: dict[str, Callable[[Path, Any], None]] = {
    ".safetensors": _write_safetensors, ".npz": _write_npz, ".msgpack": _write_msgpack, ".pth": _write_torch,
    ".pt": _write_torch,
}  # fmt: skip
