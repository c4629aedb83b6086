"""Second moments: what is measured, how it is kept, and how a killed pass goes on."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase

import errata.kit.second_moments as statistics
from errata.common.progress import Progress
from errata.contract.purity import Snapshot
from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.stack import Stack
from errata.errors import ConfigError, StorageError
from errata.kit.second_moments import RIDGES, SecondMoment, second_moments
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.artifacts import Artifacts
from errata.model.forward import trace
from errata.model.tokens import encode
from errata.testing import edit_with
from tests.families import CONTEXT, MLP, SENTENCES, architectures, build, build_model, put_on
from tests.helpers import GOLDEN

TEXT = [*SENTENCES, *(f"{a} {b}" for a, b in zip(SENTENCES, SENTENCES[3:], strict=False))]


class _Keys:
    """The inputs of some modules, one document at a time, without padding."""

    def __init__(self, model, layers, documents, keep_end=None):
        self.sums = dict.fromkeys(layers, 0.0)
        self.count = 0
        handles = [
            model.module.get_submodule(model.anatomy.mlp_out(layer)).register_forward_pre_hook(
                self._hook(layer)
            )
            for layer in layers
        ]
        for document in documents:
            batch = encode(model.tokenizer, [document], keep_end=keep_end)
            self.count += batch.lengths[0]
            with torch.no_grad():
                model.module(**batch.inputs(positions=False))
        for handle in handles:
            handle.remove()

    def _hook(self, layer):
        def hook(module, args):
            keys = args[0].double().reshape(-1, args[0].shape[-1])
            self.sums[layer] = self.sums[layer] + keys.T @ keys

        return hook


class _Stops(Progress):
    """Ends the work with Ctrl-C before the window of this number; counts those before it."""

    def __init__(self, before=10**9):
        self.before, self.seen = before, 0

    def track(self, items, text, total=None):
        for item in items:
            if self.seen == self.before:
                raise KeyboardInterrupt
            self.seen += 1
            yield item


def _calls(model, name):
    """Count how often a module runs, in a list of one number."""
    count = [0]

    def hook(module, args):
        count[0] += 1

    hook.__module__ = "torch"  # one that leaves the numbers alone
    model.module.get_submodule(name).register_forward_pre_hook(hook)
    return count


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(statistics, "_WINDOW_DOCUMENTS", 4)


# -- what is measured ----------------------------------------------------------------------------


@pytest.mark.slow
def test_parity_with_the_authors_code(tmp_path):
    folder = GOLDEN
    module = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    anatomy = Anatomy.of(module, architectures())
    model = Stack.on(Model(module, tokenizer, anatomy, artifacts=Artifacts(tmp_path)))
    where = folder / "1_second_moment"
    documents = (where / "text.txt").read_text(encoding="utf-8").splitlines()
    golden = load_file(where / "second_moment.safetensors")
    recorded = json.loads((where / "second_moment.json").read_text(encoding="utf-8"))
    measured = second_moments(model, range(4), corpus=documents, tokens="all")
    for layer, moment in measured.items():
        assert moment.count == recorded["layers"][str(layer)]["token_count"] == 69700
        assert moment.matrix.dtype == torch.float64
        assert (moment.matrix - golden[f"C.{layer}"].double()).abs().max() < 1e-6
        assert moment.ridge == 0.0


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "opt", "bloom", "gemma2", "bert"])
def test_it_is_the_mean_over_real_tokens(family, tmp_path):
    model = build_model(family, tmp_path, corpus=TEXT)
    keys = _Keys(model, [0, 2], TEXT)
    measured = second_moments(model, [2, 0], tokens="all", batch_tokens=150)
    assert list(measured) == [0, 2]
    for layer, moment in measured.items():
        assert moment.count == keys.count
        assert moment.layer == layer
        expected = keys.sums[layer] / keys.count
        torch.testing.assert_close(moment.matrix, expected, rtol=1e-4, atol=1e-6)


def test_an_encoder_decoder_is_measured_where_it_reads(tmp_path):
    model = build_model("t5", tmp_path, corpus=TEXT)
    moment = second_moments(model, [-1], tokens="all")[2]
    total, count = torch.zeros(moment.matrix.shape, dtype=torch.float64), 0
    for text in TEXT:
        ids = encode(model.tokenizer, [text], keep_end=True).input_ids
        with torch.no_grad(), trace(model.module, "encoder.block.2.layer.1.DenseReluDense.wo",
                                    inputs=True) as seen:  # fmt: skip
            model.module.encoder(input_ids=ids)
        (spied,) = seen.values()
        keys = spied.input[0].double()
        total, count = total + keys.T @ keys, count + len(keys)
    assert moment.count == count
    torch.testing.assert_close(moment.matrix, total / count, rtol=1e-4, atol=1e-5)


def test_half_precision_models_are_summed_in_double(tmp_path):
    model = build_model("llama", tmp_path, torch.bfloat16, corpus=TEXT)
    keys = _Keys(model, [1], TEXT[:4])
    moment = second_moments(model, [1], corpus=TEXT[:4], tokens="all", batch_tokens=1)[1]
    assert moment.matrix.dtype == torch.float64
    torch.testing.assert_close(moment.matrix, keys.sums[1] / keys.count, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 37, 200])
def test_exactly_so_many_tokens(tokens, tmp_path):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    assert second_moments(model, [0], tokens=tokens)[0].count == tokens
    assert second_moments(model, [1], tokens=tokens, batch_tokens=16)[1].count == tokens


def test_by_default_a_small_multiple_of_the_dimension(tmp_path):
    model = build_model("gpt2", tmp_path)  # on the text that ships with errata
    assert second_moments(model, [0])[0].count == statistics.TOKENS_PER_DIMENSION * MLP


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_long_document_is_split_and_counts_whole(family, tmp_path):
    long = " ".join(SENTENCES * 3)
    model = build_model(family, tmp_path, corpus=[long])
    lengths = []

    def hook(module, args):
        lengths.append(args[0].shape[1])

    model.module.get_submodule(model.anatomy.mlp_out(0)).register_forward_pre_hook(hook)
    count = second_moments(model, [0], tokens="all")[0].count
    own = encode(model.tokenizer, [long], keep_end=False).lengths[0]
    added = {"gpt2": 0, "llama": 1, "bert": 2}[family]
    own -= min(added, 1)  # the BOS or [CLS] that `encode` keeps
    pieces = -(-own // (CONTEXT - added))
    assert pieces > 1
    assert max(lengths) == CONTEXT
    assert count == own + added * pieces


def test_one_pass_stops_at_the_highest_layer(tmp_path):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    first, top = _calls(model, "transformer.h.0"), _calls(model, "transformer.h.2")
    second_moments(model, [0, 1], tokens="all", batch_tokens=500)
    passes = first[0]
    assert passes > 0
    assert top[0] == 0
    build_model("gpt2", tmp_path / "other")
    second_moments(model, [0], tokens=100, batch_tokens=500)
    assert first[0] < 2 * passes


def test_the_model_is_left_as_it_was(tmp_path):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    before = Snapshot(model)
    second_moments(model, [1], tokens=200)
    assert before.changed() == []


# -- how it is kept ------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(tmp_path):
    first = build_model("gpt2", tmp_path, corpus=TEXT)
    kept = second_moments(first, [0, 1], tokens=150)
    assert second_moments(first, [1], tokens=150)[1] is kept[1]  # with its Cholesky factor
    again = build_model("gpt2", tmp_path, corpus=TEXT)
    calls = _calls(again, "transformer.h.0")
    loaded = second_moments(again, [0, 1], tokens=150)
    assert calls == [0]
    for layer in (0, 1):
        assert torch.equal(loaded[layer].matrix, kept[layer].matrix)
        assert loaded[layer].count == kept[layer].count == 150
    for changes in (
        {"layers": [2], "tokens": 150},
        {"layers": [0], "tokens": 151},
        {"layers": [0], "tokens": 150, "corpus": TEXT[:-1]},
    ):
        calls[0] = 0
        second_moments(again, **changes)
        assert calls[0] > 0
    other = build_model("gpt2", tmp_path, seed=1, corpus=TEXT)
    assert not torch.equal(second_moments(other, [0], tokens=150)[0].matrix, kept[0].matrix)


def test_where_documents_end_is_part_of_the_texts_identity():
    assert statistics.text_hash(["ab", "c"]) != statistics.text_hash(["a", "bc"])


def test_a_damaged_file_is_measured_again(tmp_path):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    kept = second_moments(model, [0], tokens=150)[0]
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    again = build_model("gpt2", tmp_path, corpus=TEXT)
    assert torch.equal(second_moments(again, [0], tokens=150)[0].matrix, kept.matrix)


# -- killed and resumed --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", 500])
def test_a_killed_pass_goes_on_where_it_saved(tokens, tmp_path, small_windows):
    wanted = {"tokens": tokens, "save_seconds": 0.0}
    whole = _Stops()
    model = build_model("gpt2", tmp_path / "whole", corpus=TEXT, progress=whole)
    expected = second_moments(model, [0, 2], **wanted)

    killed = build_model("gpt2", tmp_path / "killed", corpus=TEXT, progress=_Stops(before=2))
    before = Snapshot(killed)
    with pytest.raises(KeyboardInterrupt):
        second_moments(killed, [0, 2], **wanted)
    assert before.changed() == []
    (partial,) = (tmp_path / "killed").rglob("*.safetensors")
    assert "partial" in str(partial)

    rest = _Stops()
    resumed = build_model("gpt2", tmp_path / "killed", corpus=TEXT, progress=rest)
    measured = second_moments(resumed, [0, 2], **wanted)
    assert rest.seen == whole.seen - 2
    for layer in (0, 2):
        assert torch.equal(measured[layer].matrix, expected[layer].matrix)
        assert measured[layer].count == expected[layer].count
    assert not partial.exists()
    assert len(list((tmp_path / "killed").rglob("*.safetensors"))) == 2


def test_partial_sums_of_other_layers_are_not_taken_up(tmp_path, small_windows):
    killed = build_model("gpt2", tmp_path, corpus=TEXT, progress=_Stops(before=3))
    with pytest.raises(KeyboardInterrupt):
        second_moments(killed, [0], tokens="all", save_seconds=0.0)
    fresh = build_model("gpt2", tmp_path, corpus=TEXT)
    keys = _Keys(fresh, [0, 1], TEXT)
    for layer, moment in second_moments(fresh, [0, 1], tokens="all").items():
        assert moment.count == keys.count
        torch.testing.assert_close(
            moment.matrix, keys.sums[layer] / keys.count, rtol=1e-4, atol=1e-6
        )


def test_a_disk_that_refuses_partial_sums_does_not_stop_the_pass(
    tmp_path, small_windows, caplog, monkeypatch
):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    save = Artifacts.save

    def refuse(self, key, tensors, metadata):
        if "partial" in key[2]:
            raise StorageError("the disk is full")
        return save(self, key, tensors, metadata)

    monkeypatch.setattr(Artifacts, "save", refuse)
    with caplog.at_level(logging.WARNING, logger="errata"):
        moment = second_moments(model, [0], tokens="all", save_seconds=0.0)[0]
    assert moment.count > 0
    assert "Partial sums were not saved" in caplog.text


# -- solving -------------------------------------------------------------------------------------


def test_solving_inverts(tmp_path):
    model = build_model("gpt2", tmp_path)
    moment = second_moments(model, [1], tokens=20 * MLP)[1]
    assert moment.ridge == 0.0
    assert moment.cholesky is moment.cholesky
    generator = torch.Generator().manual_seed(0)
    for shape in ((MLP,), (MLP, 3)):
        k = torch.randn(shape, generator=generator)
        solved = moment.solve(k)
        assert solved.shape == shape
        assert solved.dtype == torch.float64
        torch.testing.assert_close(moment.matrix @ solved, k.double(), rtol=1e-7, atol=1e-9)
    with pytest.raises(ConfigError, match=r"shape \(3,\).*\(48, N\)"):
        moment.solve(torch.zeros(3))
    assert torch.equal(moment.to("cpu").solve(k), solved)


def test_too_few_tokens_take_a_ridge_and_a_warning(tmp_path, caplog):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    moment = second_moments(model, [1], tokens=MLP // 2)[1]
    with caplog.at_level(logging.WARNING, logger="errata"):
        solved = moment.solve(torch.ones(MLP))
        moment.solve(torch.ones(MLP))
    assert torch.isfinite(solved).all()
    assert moment.ridge == pytest.approx(RIDGES[0] * moment.matrix.diagonal().mean().item())
    assert caplog.text.count("is singular") == 1
    assert "24 tokens for D = 48 dimensions, 0 of which never fired" in caplog.text


def test_as_many_tokens_as_dimensions_are_warned_of(tmp_path, caplog):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    for tokens, warnings in ((MLP + 2, 1), (2 * MLP, 0)):
        caplog.clear()
        moment = second_moments(model, [1], tokens=tokens)[1]
        moment.solve(torch.ones(MLP))
        moment.solve(torch.ones(MLP))
        assert moment.ridge == 0.0
        assert caplog.text.count("small singular values are noise") == warnings


def test_a_neuron_that_never_fires_is_named(caplog):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    keys[:, 3] = 0
    moment = SecondMoment(keys.T @ keys / 100, 100, 5)
    with caplog.at_level(logging.WARNING, logger="errata"):
        solved = moment.solve(keys[0])
    assert "layer 5" in caplog.text
    assert "8 dimensions, 1 of which never fired" in caplog.text
    torch.testing.assert_close(moment.matrix @ solved, keys[0], rtol=1e-6, atol=1e-6)


def test_different_scales_are_not_taken_for_dependence():
    scales = torch.logspace(0, -9, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 6, generator=generator, dtype=torch.float64) * scales
    assert SecondMoment(keys.T @ keys / 200, 200, 0).ridge == 0.0


def test_nothing_to_invert_is_an_error():
    with pytest.raises(ConfigError, match="cannot be inverted"):
        SecondMoment(torch.zeros(4, 4, dtype=torch.float64), 10, 0).solve(torch.ones(4))


# -- what is refused -----------------------------------------------------------------------------


def test_an_edited_model_is_not_measured(tmp_path):
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    name = model.anatomy.weight(model.anatomy.mlp_out(0))
    factor = Factor(torch.ones(32, 1), torch.ones(MLP, 1), transposed=True)
    put_on(model.stack, edit_with(1, "e1", LowRankDelta({name: factor})))
    with pytest.raises(ConfigError, match=r"without edits, but 1 are active \(e1\)"):
        second_moments(model, [1], tokens=100)
    with model.base_state():
        kept = second_moments(model, [1], tokens=100)[1]
    assert second_moments(model, [1], tokens=100)[1] is kept  # loading needs no base
    pristine = build_model("gpt2", tmp_path / "other", corpus=TEXT)
    assert torch.equal(second_moments(pristine, [1], tokens=100)[1].matrix, kept.matrix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "No layers"),
        ({"layers": [7]}, "Layer 7 is out of range"),
        ({"layers": [0], "tokens": 0}, "tokens=0"),
        ({"layers": [0], "tokens": "many"}, "tokens='many'"),
        ({"layers": [0], "batch_tokens": 0}, "batch_tokens=0"),
        ({"layers": [0], "corpus": "one text"}, "give a list of documents"),
        ({"layers": [0], "corpus": ["", " "]}, "holds no text"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        second_moments(build_model("gpt2", tmp_path, corpus=TEXT), **arguments)


def test_a_missing_default_text_says_how_to_pass_one(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "text_path", lambda name: tmp_path / f"{name}.txt")
    with pytest.raises(ConfigError, match=r"corpus=\[document"):
        second_moments(build_model("gpt2", tmp_path), [0])


def test_keys_that_are_not_finite_are_refused(tmp_path):
    module, tokenizer = build("gpt2")
    with torch.no_grad():
        module.transformer.h[0].mlp.c_fc.bias[0] = float("nan")
    anatomy = Anatomy.of(module, architectures())
    model = Stack.on(Model(module, tokenizer, anatomy, artifacts=Artifacts(tmp_path)))
    with pytest.raises(ConfigError, match=r"layer 0 are not finite .*wider dtype"):
        second_moments(model, [0], corpus=TEXT)
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.gpu
def test_a_gpu_measures_the_same(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    module, tokenizer = build("llama")
    anatomy = Anatomy.of(module, architectures())
    on_cpu = Stack.on(Model(module, tokenizer, anatomy, artifacts=Artifacts(tmp_path / "cpu")))
    expected = second_moments(on_cpu, [1], corpus=TEXT, tokens="all")[1]
    module, _ = build("llama")
    on_gpu = Stack.on(
        Model(module.cuda(), tokenizer, anatomy, artifacts=Artifacts(tmp_path / "gpu"))
    )
    measured = second_moments(on_gpu, [1], corpus=TEXT, tokens="all")[1]
    torch.testing.assert_close(measured.matrix, expected.matrix, rtol=1e-4, atol=1e-6)
    k = torch.ones(MLP, device="cuda")
    assert measured.solve(k).device.type == measured.to("cuda").solve(k).device.type == "cuda"


def test_what_is_computed_with_another_tokenizer_is_not_taken_for_ones_own(tmp_path):
    module, tokenizer = build("gpt2")
    _, lower = build("gpt2")
    lower.backend_tokenizer.normalizer = Lowercase()
    cache, anatomy = Artifacts(tmp_path), Anatomy.of(module, architectures())
    kept = [
        second_moments(Model(module, which, anatomy, artifacts=cache), [0], corpus=TEXT)[0].digest
        for which in (tokenizer, lower, tokenizer)
    ]
    assert kept[0] == kept[2] != kept[1]


def test_what_is_computed_under_hooks_of_other_code_is_not_kept_for_the_model(tmp_path, caplog):
    module, tokenizer = build("gpt2")
    model = Model(
        module, tokenizer, Anatomy.of(module, architectures()), artifacts=Artifacts(tmp_path)
    )
    steering = module.transformer.h[0].mlp.register_forward_hook(lambda *args: args[2] + 1.0)
    hooked = second_moments(model, [1], corpus=TEXT)[1].digest
    assert "hooks on the model (transformer.h.0.mlp)" in caplog.text
    assert second_moments(model, [1], corpus=TEXT)[1].digest == hooked
    steering.remove()
    plain = second_moments(model, [1], corpus=TEXT)[1].digest
    other = Model(module, tokenizer, model.anatomy, artifacts=Artifacts(tmp_path / "other"))
    assert plain == second_moments(other, [1], corpus=TEXT)[1].digest != hooked
