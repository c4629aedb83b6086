"""Codebook deltas: geometry, replay, storage, and what they do on a live model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from errata.anatomy import Anatomy
from errata.delta import codebook_replay
from errata.delta.codebook import CodebookDelta, CodebookSettings
from errata.delta.codebook_replay import Codebook, replay
from errata.delta.codebook_runtime import CodebookRuntime
from errata.errors import ConfigError, IntegrityError, MissingExtraError
from errata.forward import trace
from errata.model import Model
from errata.stack import Entry
from tests.families import architectures, build

MODULE = "m"


def entry(
    key: Sequence[float], label: int | Sequence[int], value: float = 1.0, **options: object
) -> CodebookDelta:
    """An entry of a codebook with keys of any width and values of width one."""
    ids = [label] if isinstance(label, int) else list(label)
    ignored = int(options.pop("ignored", 0))  # type: ignore[call-overload]
    return CodebookDelta(
        MODULE,
        torch.tensor(key, dtype=torch.float32),
        torch.tensor([value]),
        torch.tensor(ids),
        CodebookSettings(**options),  # type: ignore[arg-type]
        ignored=ignored,
    )


def numbered(deltas: Sequence[CodebookDelta]) -> list[tuple[str, CodebookDelta]]:
    return [(f"{index}", delta) for index, delta in enumerate(deltas)]


def same(one: Codebook, other: Codebook) -> bool:
    if len(one) == len(other) == 0:  # an empty one may or may not know its widths
        return one.rows == other.rows
    return (
        torch.equal(one.keys, other.keys)
        and torch.equal(one.values, other.values)
        and torch.equal(one.radii, other.radii)
        and one.rows == other.rows
        and [s.operation for s in one.log] == [s.operation for s in other.log]
    )


# -- the rules -----------------------------------------------------------------------------------


def test_a_far_key_is_added_with_the_initial_radius() -> None:
    book = replay(numbered([entry([0, 0], 1), entry([2.1, 0], 2)]))
    assert [s.operation for s in book.log] == ["add", "add"]
    assert book.radii.tolist() == [1.0, 1.0]


def test_the_same_answer_nearby_expands_the_ball_and_replaces_the_value() -> None:
    book = replay(numbered([entry([0, 0], 1, 5.0), entry([1.5, 0], 1, 7.0)]))
    assert [s.operation for s in book.log] == ["add", "expand"]
    assert book.radii.tolist() == [1.5]
    assert book.values.tolist() == [[7.0]]
    assert book.rows == {"0": 0, "1": 0}


def test_the_same_answer_inside_the_ball_changes_the_value_only() -> None:
    book = replay(numbered([entry([0, 0], 1, 5.0), entry([0.5, 0], 1, 7.0)]))
    assert book.log[-1].operation == "retrain"
    assert book.radii.tolist() == [1.0]
    assert book.values.tolist() == [[7.0]]


def test_another_answer_nearby_splits_the_distance() -> None:
    for distance in (1.5, 0.5):  # outside and inside the radius
        book = replay(numbered([entry([0, 0], 1), entry([distance, 0], 2)]))
        assert book.log[-1].operation == "split"
        assert book.radii.tolist() == pytest.approx([distance / 2 - 1e-5, distance / 2], abs=1e-7)


def test_another_answer_to_the_very_same_prompt_supersedes_the_old_one() -> None:
    deltas = [entry([0, 0], 1, 5.0), entry([1.5, 0], 1, 6.0), entry([0, 0], 2, 7.0)]
    book = replay(numbered(deltas))
    assert book.log[-1].operation == "supersede"
    match = book.look_up(torch.tensor([[0.0, 0.0], [1.4, 0.0]]))
    assert book.values[match.rows].tolist() == [[7.0], [7.0]]  # it took over the whole ball
    assert match.inside.all()
    back = replay(numbered([*deltas, entry([0, 0], 1, 8.0)]))
    match = back.look_up(torch.tensor([[0.0, 0.0]]))
    assert back.values[match.rows].tolist() == [[8.0]]


def test_labels_are_compared_exactly_unless_asked_otherwise() -> None:
    one, other = [10, 20], [15, 15]  # the same mean
    assert not entry([0], one).same_label(entry([0], other))
    assert entry([0], one, label_match="upstream").same_label(entry([0], other))
    # The published mean runs over the ignored prompt as well.
    assert not entry([0], one, label_match="upstream", ignored=3).same_label(entry([0], one))


def test_a_void_entry_changes_nothing() -> None:
    void = CodebookDelta(MODULE, torch.zeros(2), None, torch.tensor([1]))
    book = replay(numbered([entry([0, 0], 1), void]))
    assert len(book) == 1
    assert book.rows == {"0": 0, "1": -1}
    assert same(replay([("0", entry([0, 0], 1))]), replay([("0", entry([0, 0], 1))]))


def test_cosine_distance_does_not_see_length() -> None:
    options = {"distance": "cosine", "eps": 0.2}
    book = replay(numbered([entry([1, 0], 1, **options), entry([0, 3], 2, **options)]))
    assert [s.operation for s in book.log] == ["add", "add"]
    match = book.look_up(torch.tensor([[100.0, 1.0], [1.0, 1.0]]))
    assert match.inside.tolist() == [True, False]
    assert match.distances.tolist() == pytest.approx([1 - math.cos(0.01), 1 - 0.5**0.5], abs=1e-5)


def test_the_tolerance_covers_rounding_at_the_surface() -> None:
    book = replay(numbered([entry([10, 0], 1), entry([11.5, 0], 1)]))
    query = torch.tensor([[11.50001, 0.0]])
    assert not book.look_up(query).inside.item()
    assert book.look_up(query, 1e-5).inside.item()
    assert not book.look_up(torch.tensor([[11.51, 0.0]]), 1e-5).inside.item()


def test_an_empty_codebook_finds_nothing() -> None:
    book = Codebook(entry([0.0], 1).book)
    assert not book.look_up(torch.zeros(3, 1)).inside.any()
    assert len(book.keys) == len(book) == 0


# -- replay --------------------------------------------------------------------------------------

point = st.lists(st.integers(-6, 6).map(lambda n: n / 3), min_size=2, max_size=2)
logs = st.lists(st.tuples(point, st.integers(0, 2)), min_size=1, max_size=12)


def entries_of(log: list[tuple[list[float], int]]) -> list[tuple[str, CodebookDelta]]:
    return numbered([entry(key, label, float(i)) for i, (key, label) in enumerate(log)])


@settings(max_examples=150, deadline=None)
@given(logs, st.lists(st.integers(0, 11), max_size=6))
def test_taking_entries_out_gives_the_codebook_in_which_they_never_were(
    log: list[tuple[list[float], int]], removed: list[int]
) -> None:
    entries = entries_of(log)
    book = replay(entries)
    whole = replay(entries)
    for index in removed:
        entries = [e for e in entries if e[0] != str(index)]
        book.become(entries)
        fresh = Codebook(book.name)
        fresh.become(entries)
        assert same(book, fresh)
    book.become(entries_of(log))  # other objects with the same content: replayed, the same result
    assert same(book, whole)


@settings(max_examples=150, deadline=None)
@given(logs)
def test_taking_back_restores_every_radius_and_value(log: list[tuple[list[float], int]]) -> None:
    entries = entries_of(log)
    book = Codebook(entries[0][1].book)
    states = []
    for edit_id, delta in entries:
        states.append((book.radii.clone(), book.values.clone(), dict(book.rows)))
        book.insert(edit_id, delta)
    for radii, values, rows in reversed(states):
        book.take_back()
        assert book.rows == rows
        assert torch.equal(book.radii, radii)
        assert torch.equal(book.values.flatten(), values.flatten())


@settings(max_examples=150, deadline=None)
@given(logs)
def test_a_new_ball_is_disjoint_from_that_of_its_nearest_other_answer(
    log: list[tuple[list[float], int]],
) -> None:
    """What the published rules promise; balls further away may overlap (see the next test)."""
    book = Codebook(entry([0.0, 0.0], 0).book)
    for edit_id, delta in entries_of(log):
        near, distance = (t[0].item() for t in book.nearest(delta.key[None]))
        step = book.insert(edit_id, delta)
        if step.operation in ("add", "split") and near >= 0:
            assert float(book.radii[near] + book.radii[step.row]) <= distance + 1e-6
        match = book.look_up(delta.key[None], 1e-5)  # every edit finds its own value
        assert match.inside.item()
        assert book.values[match.rows].tolist() == [delta.value.tolist()]


def test_where_balls_overlap_the_nearest_key_decides() -> None:
    # The third key splits with the first; the second, a little further away, keeps its radius.
    book = replay(numbered([entry([0, 0], 1), entry([2.05, 0], 2), entry([1.0, 0.1], 3)]))
    assert [s.operation for s in book.log] == ["add", "add", "split"]
    assert book.radii[1] + book.radii[2] > (book.keys[1] - book.keys[2]).norm()
    queries = torch.tensor([[1.3, 0.1], [1.7, 0.0]])
    match = book.look_up(queries)
    assert match.rows.tolist() == [2, 1]
    assert match.inside.all()


def test_replay_takes_entries_of_one_codebook() -> None:
    with pytest.raises(IntegrityError, match="nothing to replay"):
        replay([])
    with pytest.raises(IntegrityError, match="belongs to"):
        replay(numbered([entry([0.0], 1), entry([0.0], 1, distance="cosine")]))
    with pytest.raises(IntegrityError, match="does not fit"):
        replay(numbered([entry([0.0], 1), entry([0.0, 1.0], 1)]))


# -- the approximate index -----------------------------------------------------------------------


def crowd(index: str, count: int = 300, distance: str = "euclidean") -> Codebook:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, 16, generator=generator) * 3
    return replay(
        numbered(
            [
                entry(p.tolist(), i, float(i), index=index, faiss_from=50, distance=distance)
                for i, p in enumerate(points)
            ]
        )
    )


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_index_agrees_with_comparing_all(distance: str) -> None:
    pytest.importorskip("faiss")
    exact, approximate = crowd("exact", distance=distance), crowd("faiss", distance=distance)
    queries = exact.keys + 0.05 * torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    wanted, got = exact.look_up(queries), approximate.look_up(queries)
    assert torch.equal(wanted.rows, got.rows)
    assert torch.equal(wanted.inside, got.inside)
    assert torch.allclose(wanted.distances, got.distances, atol=1e-6)
    # It follows the codebook when entries go and come.
    for book in (exact, approximate):
        book.become([(s.edit_id, s.delta) for s in book.log[:200]])
        book.insert("new", entry([9.0] * 16, 999, 1.0, index="faiss", distance=distance))
    wanted, got = exact.look_up(queries[:250]), approximate.look_up(queries[:250])
    assert torch.equal(wanted.rows, got.rows)


def test_the_index_looks_behind_retired_keys() -> None:
    pytest.importorskip("faiss")
    deltas = [entry([0.0, 0.0], n, float(n), index="faiss") for n in range(40)]
    match = replay(numbered(deltas)).look_up(torch.zeros(1, 2))
    assert match.rows.tolist() == [39]


def test_without_faiss_every_key_is_compared_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise MissingExtraError("An approximate codebook index", "faiss-cpu", "faiss")

    monkeypatch.setattr(codebook_replay, "import_faiss", missing)
    for index in ("auto", "faiss"):
        caplog.clear()
        book, exact = crowd(index), crowd("exact")
        for _ in range(2):
            assert torch.equal(book.look_up(exact.keys).rows, exact.look_up(exact.keys).rows)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "errata[faiss]" in caplog.text


# -- storage -------------------------------------------------------------------------------------


def test_parts_come_back_as_they_were() -> None:
    delta = CodebookDelta(
        "h.0", torch.rand(3), torch.rand(2), torch.tensor([4, 5]),
        CodebookSettings(replacement="replace_last", eps=0.5),
        ignored=7, label_text="Rome", notes={"loss": 0.5},
    )  # fmt: skip
    again = CodebookDelta.from_parts(delta.tensors(), delta.metadata())
    assert again.metadata() == delta.metadata()
    assert all(torch.equal(t, again.tensors()[n]) for n, t in delta.tensors().items())
    assert again.nbytes == 4 * 5 + 8 * 2
    void = CodebookDelta("h.0", torch.rand(3), None, torch.tensor([4]))
    assert CodebookDelta.from_parts(void.tensors(), void.metadata()).value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "settings"),
        ({"settings": {**vars(CodebookSettings()), "distance": "manhattan"}}, "manhattan"),
        ({"settings": {**vars(CodebookSettings()), "eps": float("nan")}}, "eps"),
        ({"settings": {**vars(CodebookSettings()), "faiss_from": 0}}, "faiss_from"),
        ({"module": ""}, "module"),
        ({"module": 3}, "module"),
        ({"ignored": -1}, "ignored"),
        ({"notes": None}, "notes"),
    ],
)
def test_damaged_metadata_is_refused(change: dict[str, object], message: str) -> None:
    delta = entry([0.0], 1)
    with pytest.raises(IntegrityError, match=message):
        CodebookDelta.from_parts(delta.tensors(), {**delta.metadata(), **change})


def test_damaged_tensors_are_refused() -> None:
    delta = entry([0.0], 1)
    for change in (
        {"key": torch.zeros(1, 1)},
        {"value": torch.zeros(1, 1)},
        {"label": torch.zeros(1)},
        {"label": torch.zeros(0, dtype=torch.int64)},
        {"more": torch.zeros(1)},
    ):
        with pytest.raises(IntegrityError):
            CodebookDelta.from_parts({**delta.tensors(), **change}, delta.metadata())


# -- on a live model -----------------------------------------------------------------------------


MODULES = {
    "gpt2": "transformer.h.1.mlp.c_fc",
    "llama": "model.layers.1.mlp.down_proj",
    "opt": "model.decoder.layers.1.fc1",
    "t5": "encoder.block.1.layer.1.DenseReluDense.wo",
    "t5-decoder": "decoder.block.1.layer.2.DenseReluDense.wo",
    "bert": "bert.encoder.layer.1.output.dense",
}
PROMPTS = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [31, 32, 33, 34], [41, 42]]
REPLACEMENTS = ["replace_last", "replace_prompt", "replace_all"]


def wrapped(family: str, dtype: torch.dtype = torch.float32) -> Model:
    module, tokenizer = build(family.partition("-")[0], dtype, eos_token_id=None)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:  # weights far enough from zero that an edit shows
                parameter.mul_(3)
    return Model(module, tokenizer, Anatomy.of(module, architectures()))


def padded(model: Model, prompts: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    pad = model.tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        gap = width - len(prompt)
        rows = [*prompt], [1] * len(prompt)
        ids.append([pad] * gap + rows[0] if side == "left" else rows[0] + [pad] * gap)
        mask.append([0] * gap + rows[1] if side == "left" else rows[1] + [0] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def inputs_of(model: Model, prompts: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    batch = padded(model, prompts, side)
    kind = model.anatomy.kind
    if kind == "encoder-decoder":
        batch["decoder_input_ids"] = torch.tensor([[0, 5, 6]] * len(prompts))
    elif model.anatomy.spec.position_ids and kind == "decoder":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch


@torch.no_grad()
def query(model: Model, path: str, prompt: Sequence[int]) -> Tensor:
    """The module's input at the key position of one prompt."""
    batch = inputs_of(model, [prompt], "right")
    with trace(model.module, path, inputs=True) as seen:
        model.module(**batch)
    states = seen[path].input
    assert states is not None
    column = 0 if path.startswith("decoder") else len(prompt) - 1
    return states.reshape(-1, states.shape[-1])[column].float()


def entry_for(
    model: Model, path: str, prompt: Sequence[int], label: int, **options: object
) -> CodebookDelta:
    d_out, _ = model.anatomy.shape(model.module, path)
    value = 3 * torch.randn(d_out, generator=torch.Generator().manual_seed(label))
    config = CodebookSettings(**{"eps": 1e-2, **options})  # type: ignore[arg-type]
    return CodebookDelta(path, query(model, path, prompt), value, torch.tensor([label]), config)


@torch.no_grad()
def logits_of(model: Model, prompts: Sequence[Sequence[int]], side: str) -> list[Tensor]:
    """Logits per prompt at its real tokens (or at the decoder's)."""
    batch = inputs_of(model, prompts, side)
    logits = model.module(**batch).logits
    if "decoder_input_ids" in batch:
        return list(logits)
    return [row[m.bool()] for row, m in zip(logits, batch["attention_mask"], strict=True)]


@pytest.fixture(params=sorted(MODULES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_each_row_of_a_padded_batch_decides_for_itself(
    family: str, replacement: str, side: str
) -> None:
    if side == "left" and family in ("bert", "opt"):
        pytest.skip("counts positions from the left edge of the batch")
    model = wrapped(family)
    base = logits_of(model, PROMPTS, side)
    model.stack.set(edited(model, family, replacement))
    together = logits_of(model, PROMPTS, side)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = logits_of(model, [prompt], side)
        assert torch.allclose(together[row], alone, atol=2e-4)
        changed = (together[row] - base[row]).abs().max() > 1e-2
        nothing_before = (family, replacement) == ("t5-decoder", "replace_prompt")
        assert changed == (row in (0, 2) and not nothing_before)
        if row not in (0, 2):
            assert torch.equal(together[row], base[row])


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_generation_with_and_without_a_cache_agree(family: str, replacement: str) -> None:
    if family == "bert":
        pytest.skip("an encoder does not generate")
    if family == "t5-decoder" and replacement == "replace_prompt":
        pytest.skip("nothing lies before the decoder's start token")
    model = wrapped(family)
    assert_generation_agrees(model, edited(model, family, replacement))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_beams_of_one_prompt_share_its_decision(family: str) -> None:
    model = wrapped(family)
    assert_generation_agrees(model, edited(model, family, "replace_all"), num_beams=2)


def edited(model: Model, family: str, replacement: str) -> list[Entry]:
    """Entries for the prompts 0 and 2."""
    path = MODULES[family]
    return [
        Entry(n, f"{n}", entry_for(model, path, PROMPTS[n], 100 + n, replacement=replacement))
        for n in (0, 2)
    ]


def assert_generation_agrees(model: Model, entries: list[Entry], **options: object) -> None:
    def generate(prompts: Sequence[Sequence[int]], use_cache: bool = True) -> Tensor:
        new: Tensor = model.module.generate(  # type: ignore[operator]
            **padded(model, prompts, "left"), max_new_tokens=4, do_sample=False,
            use_cache=use_cache, output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(new.logits, 1)[:: options.get("num_beams", 1)]  # (prompts, 4, V)

    base = generate(PROMPTS)
    model.stack.set(entries)
    cached = generate(PROMPTS)
    assert torch.allclose(cached, generate(PROMPTS, use_cache=False), atol=1e-3)
    changed = (cached - base).abs().amax((1, 2)) > 1e-2
    assert changed.tolist() == [True, False, True, False]
    alone = torch.cat([generate([prompt]) for prompt in PROMPTS])
    assert torch.allclose(cached, alone, atol=1e-3)


def test_a_decode_loop_by_hand_agrees_with_generate() -> None:
    model = wrapped("gpt2")
    delta = entry_for(model, MODULES["gpt2"], PROMPTS[0], 1, replacement="replace_last")
    model.stack.set([Entry(1, "a", delta)])
    ids = torch.tensor([PROMPTS[0]])
    wanted = model.module.generate(  # type: ignore[operator]
        ids, max_new_tokens=5, do_sample=False
    )
    with torch.no_grad():
        output = model.module(ids, use_cache=True)
        cached = [output.logits[:, -1].argmax(-1)]
        for _ in range(4):
            output = model.module(
                cached[-1][:, None], past_key_values=output.past_key_values, use_cache=True
            )
            cached.append(output.logits[:, -1].argmax(-1))
        whole = ids
        with model.prompts([ids.shape[1] - 1]):
            for _ in range(5):
                best = model.module(whole, use_cache=False).logits[:, -1].argmax(-1)
                whole = torch.cat([whole, best[:, None]], dim=1)
    assert torch.equal(torch.stack(cached, 1), wanted[:, ids.shape[1] :])
    assert torch.equal(whole, wanted)


def test_teacher_forcing_says_where_the_prompt_ends() -> None:
    model = wrapped("gpt2")
    delta = entry_for(model, MODULES["gpt2"], PROMPTS[0], 1, replacement="replace_last")
    ids = torch.tensor([[*PROMPTS[0], 7, 8], [*PROMPTS[1], 7, 8, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        base = model.module(ids, attention_mask=mask).logits
        model.stack.set([Entry(1, "a", delta)])
        unsaid = model.module(ids, attention_mask=mask).logits
        with model.prompts([5, 2]):
            said = model.module(ids, attention_mask=mask).logits
            with model.prompts(None):
                assert torch.equal(model.module(ids, attention_mask=mask).logits, unsaid)
    assert torch.equal(unsaid, base)  # the last token is no prompt's end
    changed = (said - base).abs().amax(-1) > 1e-3
    assert changed.tolist() == [[False] * 5 + [True] * 3, [False] * 8]
    assert model.prompt_ends is None
    with pytest.raises(ConfigError, match="one per row"), model.prompts([1, 2, 3]):
        model.module(ids, attention_mask=mask)


def test_positions_replaced() -> None:
    model = wrapped("gpt2")
    path = MODULES["gpt2"]
    ids = torch.tensor([[*PROMPTS[0], 7, 8]])
    changed = {}
    for replacement in REPLACEMENTS:
        delta = entry_for(model, path, PROMPTS[0], 1, replacement=replacement)
        model.stack.set([Entry(1, replacement, delta)])
        with torch.no_grad(), model.prompts([5]), trace(model.module, path) as seen:
            model.module(ids)
        output = seen[path].output
        assert output is not None
        changed[replacement] = [torch.allclose(o, delta.value) for o in output[0]]
    assert changed == {
        "replace_last": [False] * 5 + [True] + [False] * 2,
        "replace_prompt": [True] * 5 + [False] * 3,
        "replace_all": [True] * 8,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = wrapped(family, dtype)
    base = logits_of(model, PROMPTS, "right")
    delta = entry_for(model, MODULES[family], PROMPTS[0], 1, replacement="replace_all")
    model.stack.set([Entry(1, "a", delta)])
    edited = logits_of(model, PROMPTS, "right")
    assert edited[0].dtype == dtype
    assert not torch.equal(edited[0], base[0])
    assert torch.equal(edited[1], base[1])


def structure(module: nn.Module) -> list[object]:
    """Everything that hangs on a module tree besides its numbers."""
    return [
        (
            name,
            id(part),
            {key: type(value) for key, value in vars(part).items()},
            [tuple(getattr(part, key)) for key in sorted(vars(part)) if "_hooks" in key],
            part.training,
        )
        for name, part in module.named_modules()
    ]


def test_attaching_and_detaching_leaves_no_trace(family: str) -> None:
    model = wrapped(family)
    before = structure(model.module)
    delta = entry_for(model, MODULES[family], PROMPTS[0], 1)
    for _ in range(2):
        model.stack.set([Entry(1, "a", delta)])
        assert structure(model.module) != before
        logits_of(model, PROMPTS, "right")
        model.stack.set([])
        assert structure(model.module) == before


def test_an_own_generate_of_the_instance_comes_back() -> None:
    model = wrapped("gpt2")
    mine = model.module.generate
    model.module.generate = mine
    model.stack.set([Entry(1, "a", entry_for(model, MODULES["gpt2"], PROMPTS[0], 1))])
    assert model.module.generate is not mine
    model.stack.set([])
    assert vars(model.module)["generate"] is mine


def test_a_trial_acts_in_place_of_what_is_attached_and_leaves_it_alone() -> None:
    model = wrapped("gpt2")
    path, other = MODULES["gpt2"], "transformer.h.2.mlp.c_proj"
    attached = entry_for(model, path, PROMPTS[0], 1, replacement="replace_last")
    tried = entry_for(model, other, PROMPTS[0], 2, replacement="replace_last")
    base = logits_of(model, PROMPTS[:1], "right")[0]
    model.stack.set([Entry(1, "a", attached)])
    edited = logits_of(model, PROMPTS[:1], "right")[0]
    before = structure(model.module)
    runtime = CodebookRuntime.of(model)
    with runtime.trial([]):
        assert torch.equal(logits_of(model, PROMPTS[:1], "right")[0], base)
    with runtime.trial([("b", tried)]):
        assert not torch.equal(logits_of(model, PROMPTS[:1], "right")[0], edited)
    assert structure(model.module) == before
    with pytest.raises(KeyError), runtime.trial([("b", tried)]):
        raise KeyError
    assert structure(model.module) == before
    assert torch.equal(logits_of(model, PROMPTS[:1], "right")[0], edited)


def test_reverting_brings_radii_back_and_codebooks_on_other_modules_stay() -> None:
    model = wrapped("gpt2")
    path = MODULES["gpt2"]
    first = entry_for(model, path, PROMPTS[0], 1, eps=1.0)
    d_out = first.value.numel()  # type: ignore[union-attr]
    near = first.key + 1.2 / math.sqrt(first.key.numel())
    rival = CodebookDelta(path, near, torch.ones(d_out), torch.tensor([2]), first.settings)
    elsewhere = entry_for(model, "transformer.h.2.mlp.c_fc", PROMPTS[1], 3)
    entries = [Entry(n, f"{n}", d) for n, d in enumerate([first, elsewhere, rival])]
    model.stack.set(entries)
    book = CodebookRuntime.of(model).book(first.book)
    assert book.radii.tolist() == pytest.approx([0.6, 0.6], abs=1e-4)
    edited = logits_of(model, PROMPTS, "right")
    model.stack.remove("2")
    assert book.radii.tolist() == [1.0]
    model.stack.add(entries[2])
    again = logits_of(model, PROMPTS, "right")
    assert all(torch.equal(a, b) for a, b in zip(edited, again, strict=True))
    model.stack.remove("0")
    assert len(book) == 1
    assert len(CodebookRuntime.of(model).book(elsewhere.book)) == 1


def test_the_edit_that_came_last_wins_where_two_codebooks_share_a_module() -> None:
    model = wrapped("gpt2")
    path = MODULES["gpt2"]
    one = entry_for(model, path, PROMPTS[0], 1, replacement="replace_last")
    two = entry_for(model, path, PROMPTS[0], 2, replacement="replace_last", distance="cosine")
    for order in ([one, two], [two, one]):
        model.stack.set([Entry(n, f"{id(d)}", d) for n, d in enumerate(order)])
        with torch.no_grad(), trace(model.module, path) as seen:
            model.module(torch.tensor([PROMPTS[0]]))
        output = seen[path].output
        assert output is not None
        assert torch.allclose(output[0, -1], order[-1].value)
        model.stack.set([])


def test_an_entry_of_another_model_does_not_pass_the_check() -> None:
    model = wrapped("gpt2")
    entry_for(model, MODULES["gpt2"], PROMPTS[0], 1).check(model)
    with pytest.raises(IntegrityError, match="does not have"):
        entry([0.0], 1).check(model)
    wrong = CodebookDelta(MODULES["gpt2"], torch.zeros(16), torch.zeros(3), torch.tensor([1]))
    with pytest.raises(IntegrityError, match="16 to 3"):
        wrong.check(model)
    bad = CodebookDelta(MODULES["gpt2"], torch.full((16,), float("nan")), None, torch.tensor([1]))
    with pytest.raises(IntegrityError, match="NaN"):
        bad.check(model)
