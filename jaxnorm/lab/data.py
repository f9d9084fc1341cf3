"""Labelled pictures, split and scaled, as NumPy arrays. Every fault of the data is a BadOption before any compile."""

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.lab.options import BadOption, need

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Dataset:
    """Pictures x, float32 (n, h, w, c), mean 0 and std 1 over the training split; labels y, int32 from 0."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int


def load(dataset: str, folder: Path | None = None) -> Dataset:
    """The data set named on the command line.

    Args:
        dataset: "digits", "fashion-mnist" or the path of an .npz file with x and y.
        folder: of fashion-mnist's four files, if not where Debian puts them.

    Raises:
        BadOption: when it is missing or is not labelled pictures. The message says how to get it.
    """
    if folder and dataset != "fashion-mnist":
        raise BadOption(f"argument --data: goes with --dataset fashion-mnist, not with {dataset!r}")
    try:
        if dataset == "digits":
            return split(*digits())
        if dataset == "fashion-mnist":
            return fashion_mnist(folder or FASHION)
        if dataset.endswith(".npz"):
            return split(*npz(Path(dataset)))
        raise BadOption("is not digits, fashion-mnist or a path that ends in .npz")
    except BadOption as error:
        raise BadOption(f"argument --dataset: {dataset!r} {error}") from None


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 pictures of 8 x 8, embedded in scikit-learn."""
    need("sklearn")
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images, bunch.target


def fashion_mnist(folder: Path) -> Dataset:
    """60,000 + 10,000 pictures of 28 x 28, in MNIST's own split and file format."""
    x, y = idx(folder / "train-images-idx3-ubyte.gz", 3), idx(folder / "train-labels-idx1-ubyte.gz", 1)
    x_test, y_test = idx(folder / "t10k-images-idx3-ubyte.gz", 3), idx(folder / "t10k-labels-idx1-ubyte.gz", 1)
    if x.shape[1:] != x_test.shape[1:]:
        raise BadOption(f"has training pictures of shape {x.shape[1:]} and test pictures of shape {x_test.shape[1:]}")
    n = len(x)
    return prepared(np.concatenate([x, x_test]), np.concatenate([y, y_test]), train=slice(n), test=slice(n, None))


def idx(path: Path, ndim: int) -> np.ndarray:
    """MNIST's format, gzipped: 0, 0, the type (8: bytes), the number of dimensions, the sizes, the bytes."""
    if not path.is_file():
        raise BadOption(
            f"has no file {str(path)!r}: apt-get install dataset-fashion-mnist, or give the folder with --data DIR"
        )
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError("its first four bytes are wrong")
        sizes = np.frombuffer(raw, ">i4", ndim, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BadOption(f"has a file {str(path)!r} that is not in MNIST's format: {error}") from None


def npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays x and y of a file that numpy.savez wrote."""
    if not path.is_file():
        raise BadOption("is not a file; write one with numpy.savez(PATH, x=x, y=y)")
    try:
        zipfile.ZipFile(path).close()  # np.load would take what is no zip file for a pickle
        with np.load(path, allow_pickle=False) as file:
            return file["x"], file["y"]
    except KeyError:
        raise BadOption("has no array x or no array y; write it with numpy.savez(PATH, x=x, y=y)") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadOption(f"is not a readable .npz file: {error}") from None


def split(x: np.ndarray, y: np.ndarray) -> Dataset:
    """One fifth is kept for the test, the same one in every run."""
    order = np.random.default_rng(0).permutation(len(x) if x.ndim else 0)
    return prepared(x, y, train=order[len(order) // 5 :], test=order[: len(order) // 5])


def prepared(x: np.ndarray, y: np.ndarray, train: Any, test: Any) -> Dataset:
    """Checks that x and y are labelled pictures, scales x and numbers the classes from 0."""
    if x.ndim not in (3, 4) or x.dtype.kind not in "buif":
        raise BadOption(f"has x of shape {x.shape} and dtype {x.dtype}; wanted (n, h, w) or (n, h, w, c) real numbers")
    if y.shape != x.shape[:1] or y.dtype.kind not in "bui":
        raise BadOption(f"has y of shape {y.shape} and dtype {y.dtype}; wanted {x.shape[:1]} integers, one for each x")
    if x.size == 0 or len(x) < 5:
        raise BadOption(f"has x of shape {x.shape}; wanted five or more pictures, of one or more pixels")
    labels, y = np.unique(y, return_inverse=True)
    if len(labels) < 2:
        raise BadOption(f"has one class only, y = {labels[0]}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32).reshape(*x.shape[:3], -1)
    if not np.isfinite(x).all():
        raise BadOption("has NaN or infinity in x, or numbers too large for float32")
    mean, std = x[train].mean(dtype=np.float64), x[train].std(dtype=np.float64)
    if std == 0:
        raise BadOption("has the same number in all of x")
    x, y = ((x - mean) / std).astype(np.float32), y.astype(np.int32)
    return Dataset(x[train], y[train], x[test], y[test], len(labels))
