"""What a model and its ledger survive: files that change, other code's hands, threads, bad data."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from errata import Editor, Request, hookimpl, zoo
from errata.edits.delta import (
    AdapterDelta,
    DenseDelta,
)
from errata.edits.edit import Edit
from errata.edits.ledger import content, write_export
from errata.errors import ConfigError, ErrataError, IntegrityError, LedgerError, PluginError
from errata.model.artifacts import Artifacts
from errata.model.scoring import score_targets
from errata.model.structure import Structure
from errata.testing import edit_with, state_of
from errata.testing.contract import assert_same
from tests.families import build

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
ADA = Request(prompt="{} lives in", subject="Ada", target_new="Rome")
FC, OUT = "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"
WEIGHT, BIAS, NORM = f"{OUT}.weight", f"{OUT}.bias", "transformer.h.0.ln_1.weight"


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor(*build("gpt2"), guards=QUIET) as opened:
        yield opened


# -- the base --------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Editor, Path, bytes]]:
    """An editor of a checkpoint's copy, the file of its weights, and what that holds."""
    folder = shutil.copytree(zoo.model_path("atlas-gpt2"), tmp_path / "model")
    file = folder / "model.safetensors"
    file.chmod(0o644)
    with Editor(folder, guards=QUIET) as editor:
        yield editor, file, file.read_bytes()


@pytest.mark.parametrize("how", ["another", "cut off"])
def test_a_base_that_changes_underneath_is_refused_and_nothing_moves(
    how: str, opened: tuple[Editor, Path, bytes]
) -> None:
    editor, file, data = opened
    base = state_of(editor.model)
    edit = editor.edit(ADA, method="toy-low-rank")
    edited = state_of(editor.model)
    if how == "another":
        header = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:header] + b"\7" * (len(data) - header))
    else:
        os.truncate(file, 1000)
    assert any("was changed since" in problem for problem in editor.verify())
    for change in (
        lambda: editor.revert(edit),
        lambda: editor.edit(ADA, method="toy-low-rank", size=0.3),
    ):
        with pytest.raises(IntegrityError, match="was changed since the model was opened"):
            change()
    assert_same(state_of(editor.model), edited)
    assert [entry.active for entry in editor.log()] == [True]
    editor.generate(ADA.text, max_new_tokens=1)  # the live weights lie in memory
    file.write_bytes(data)
    assert editor.verify() == []
    editor.revert(edit)
    assert_same(state_of(editor.model), base)


def test_a_base_that_another_file_takes_the_place_of_stays(
    opened: tuple[Editor, Path, bytes],
) -> None:
    editor, file, data = opened
    base = state_of(editor.model)
    edit = editor.edit(ADA, method="toy-low-rank")
    editor.model.pristine.digest_all()
    other = file.with_name("other")
    other.write_bytes(data[:-9] + b"\7" * 9)
    other.replace(file)
    assert editor.verify() == []
    editor.revert(edit)
    file.unlink()
    assert_same(state_of(editor.model), base)
    assert editor.verify() == []


def test_nan_in_a_base_is_part_of_the_base() -> None:
    module, tokenizer = build("gpt2")
    with torch.no_grad():
        module.transformer.wpe.weight[5, 0] = float("nan")
        module.get_parameter(WEIGHT)[0, 0] = float("nan")
    with Editor(module, tokenizer, guards=QUIET) as editor:
        assert editor.verify() == []
        edit = editor.edit(ADA, method="toy-low-rank")
        assert editor.verify() == []
        editor.revert(edit)
        assert editor.verify() == []
        with torch.no_grad():
            module.transformer.wpe.weight[6, 0] = float("nan")
        assert editor.verify() == ["tensor transformer.wpe.weight is not what the stack says"]


def test_many_tensors_that_differ_are_the_first_few_and_how_many_more() -> None:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, guards=QUIET) as editor:
        module.double()
        *named, last = editor.verify()
        count = len(editor.model.parameters)
        assert all("is not what the stack says" in line for line in named)
        assert len(named) < 10 < count
        assert last.startswith(f"{count - len(named)} more tensors differ, of ")


# -- other code ------------------------------------------------------------------------------------


def hook(register: str) -> Callable[[nn.Module], Any]:
    return lambda root: getattr(root.get_submodule(FC), register)(lambda *_: None)


def replace_parameter(root: nn.Module) -> None:
    module = root.get_submodule(FC)
    module.weight = nn.Parameter(module.weight.detach().clone())


def swap_module(root: nn.Module) -> None:
    root.transformer.h[0].mlp = nn.Identity()


def own_method(root: nn.Module) -> None:
    root.get_submodule(FC).forward = lambda x: x


def hook_everywhere(_: nn.Module) -> Any:
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


TOUCHES = {
    hook("register_forward_hook"): f"{FC} (hooks)",
    hook("register_forward_pre_hook"): f"{FC} (hooks)",
    hook("register_full_backward_hook"): f"{FC} (hooks)",
    hook_everywhere: "all modules of the process (hooks)",
    replace_parameter: f"{FC}.weight",
    own_method: f"{FC} (methods: forward)",
    swap_module: "module transformer.h.0.mlp",
}


@pytest.mark.parametrize("edited", ["", "toy-adapter", "toy-codebook"])
def test_verify_names_what_other_code_changed(edited: str, editor: Editor) -> None:
    before = Structure(editor.model.module)
    if edited:
        editor.edit(ADA, method=edited)
    for touch, names in TOUCHES.items():
        assert editor.verify() == []
        touch(editor.model.module)
        try:
            assert editor.verify() == [f"{names}: changed by other code"]
            if touch is not swap_module:  # what comes off and on again does not hide it
                with editor.disabled():
                    pass
                assert editor.verify() == [f"{names}: changed by other code"]
        finally:
            with editor.disabled():
                before.restore()


@pytest.mark.parametrize("branch", [False, True])
def test_an_edit_that_cannot_be_hung_leaves_nothing(branch: bool) -> None:
    with Editor(*build("gpt2"), guards=QUIET, branch=branch) as editor:
        model = editor.model
        said, before = editor.generate(ADA.text), Structure(model.module)
        # The first weight has its branch already when the bias of the second cannot have one.
        names = (WEIGHT, "transformer.h.1.mlp.c_proj.bias")
        delta = DenseDelta({name: torch.ones_like(model.parameter(name)) for name in names})
        bad = AdapterDelta(*adapter(torch.float32))
        bad.pieces[f"{OUT}.nowhere"] = bad.pieces[OUT]
        wanted = delta if branch else bad
        with pytest.raises((ErrataError, AttributeError)):
            model.stack.set([edit_with(1, "1" * 12, wanted)])
        assert before.changed() == []
        assert editor.verify() == []
        assert editor.generate(ADA.text) == said


# -- one editor ------------------------------------------------------------------------------------


def test_a_module_has_one_editor_at_a_time() -> None:
    module, tokenizer = build("gpt2")
    first = Editor(module, tokenizer, guards=QUIET)
    kin = type(module)(module.config)  # another object around a part of the same weights
    kin.set_input_embeddings(module.get_input_embeddings())
    for taken in (module, kin):
        with pytest.raises(ConfigError, match="Another editor has this model"):
            Editor(taken, tokenizer)
    edit = first.edit(ADA, method="toy-codebook")
    first.revert(edit)
    first.close()
    second = Editor(module, tokenizer, guards=QUIET)  # closed: allowed
    del second
    gc.collect()
    third = Editor(module, tokenizer, guards=QUIET)  # gone: allowed
    third.close()


def test_an_editor_that_did_not_open_holds_nothing(tmp_path: Path) -> None:
    module, tokenizer = build("gpt2")
    (tmp_path / "file").write_text("no ledger")
    with pytest.raises(IntegrityError):
        Editor(module, tokenizer, ledger=tmp_path / "file")
    Editor(module, tokenizer, guards=QUIET).close()


# -- threads ---------------------------------------------------------------------------------------


def at_once(calls: list[Callable[[], None]]) -> list[BaseException]:
    """Run the calls in threads, all beginning together; return what they raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def work(call: Callable[[], None]) -> None:
        start.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


KINDS = ("toy-codebook", "toy-adapter", "toy-hint", "toy-oracle", "toy-low-rank")
PEOPLE = [
    Request(prompt="{} lives in", subject=name, target_new=city)
    for name, city in zip(("Ada", "Grace", "Alan", "Edsger", "Barbara"), ("Rome",) * 5, strict=True)
]


@pytest.mark.parametrize("branch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_four_threads_answer_as_one_does_with_edits_of_every_kind(branch: bool) -> None:
    with Editor(*build("gpt2"), guards=QUIET, branch=branch) as editor:
        for request, method in zip(PEOPLE, KINDS, strict=True):
            editor.edit(request, method=method)

        def answers(request: Request) -> Any:
            (score,) = score_targets(editor.model, [request.text], ["Paris"])
            return editor.generate(request.text, max_new_tokens=4), score.logprobs

        alone = [answers(request) for request in PEOPLE]

        def work(shift: int) -> None:
            for i in range(10):
                at = (i * 3 + shift) % 5
                assert answers(PEOPLE[at]) == alone[at]

        assert at_once([lambda n=n: work(n) for n in range(4)]) == []


def test_who_asks_while_others_edit_sees_the_model_before_or_after(editor: Editor) -> None:
    edits = [
        editor.edit(request, method=method)
        for request, method in zip(PEOPLE[:3], ("toy-codebook", "toy-adapter", "toy-low-rank"),
                                   strict=True)
    ]  # fmt: skip
    states: set[Any] = set()

    def ask() -> Any:
        # The model itself is asked, not the editor: it is held as well.
        (score,) = score_targets(editor.model, [ADA.text], ["Paris"])
        return score.logprobs

    for on in range(8):
        with editor.only(*(edit for i, edit in enumerate(edits) if on >> i & 1)):
            states.add(ask())
    seen: list[Any] = []

    def change(edit: Edit) -> None:
        for _ in range(6):
            editor.revert(edit)
            editor.apply(edit)
            assert editor.verify() == []

    asking = [lambda: seen.extend(ask() for _ in range(40)) for _ in range(2)]
    changing = [lambda edit=edit: change(edit) for edit in edits]
    assert at_once([*asking, *changing]) == []
    assert set(seen) <= states
    assert [entry.active for entry in editor.log()] == [True] * 3


def test_a_thread_that_runs_the_model_cannot_change_it(editor: Editor) -> None:
    with editor.model.access.running(), pytest.raises(LedgerError, match="this very thread"):
        editor.edit(ADA, method="toy-low-rank")


# -- files from elsewhere --------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    return torch.complex(made, made) if dtype.is_complex else (made * 50).to(dtype)


def adapter(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    prefix = f"base_model.model.{OUT}"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
    return config, {
        f"{prefix}.lora_A.weight": random(2, 48, dtype=dtype),
        f"{prefix}.lora_B.weight": random(32, 2, dtype=dtype),
    }


def parts(kind: str, dtype: torch.dtype, name: str = WEIGHT) -> content.Parts:
    """Return a delta's parts for GPT-2's projection (48 → 32), all its numbers of one dtype."""
    wide, tall = random(2, 48, dtype=dtype), random(2, 32, dtype=dtype)
    if kind == "dense":
        shape = (48, 32) if name == WEIGHT else (32,)
        return content.Parts(kind, {}, {name: random(*shape, dtype=dtype)})
    if kind == "sparse_rows":
        values = tall if name == WEIGHT else random(2, dtype=dtype)
        index = torch.tensor([0, 3])
        stored = {f"{name}:index": index, f"{name}:values": values}
        return content.Parts(kind, {"axis": {name: 0}}, stored)
    if kind == "low_rank":
        stored = {f"{name}:u": tall.T.contiguous(), f"{name}:v": wide.T.contiguous()}
        return content.Parts(kind, {"transposed": {name: True}}, stored)
    if kind == "key_value":
        stored = {"k": wide, "w": wide.clone(), "r": tall, "s": torch.ones(2).to(dtype)}
        about = {"transposed": {name: True}, "metric": {name: {"digest": "identity"}}}
        return content.Parts(kind, about, {f"{name}:{part}": t for part, t in stored.items()})
    config, tensors = adapter(dtype)
    if name != WEIGHT:
        module = name.rpartition(".")[0]
        tensors = {key.replace(OUT, module): tensor for key, tensor in tensors.items()}
    return content.Parts(kind, {"config": config}, tensors)


def file_of(
    folder: Path, editor: Editor, *all_parts: content.Parts, names: tuple[str, ...], **fields: Any
) -> Path:
    """Write what a stranger might send: one edit for each of the parts."""
    pairs = []
    for number, part in enumerate(all_parts):
        about = {"fingerprint": editor.model.fingerprint_of(names), **fields}
        size = sum(t.numel() * t.element_size() for t in part.tensors.values())
        edit = Edit(
            sequence=number + 1, method="toy-low-rank", delta_kind=part.kind, requests=(ADA,),
            config={}, blob="a" * 64, nbytes=size, **about,
        )  # fmt: skip
        pairs.append((edit, part))
    path = folder / "strange.errata"
    return write_export(path, pairs, Artifacts(folder / "made"), overwrite=True)


STORED = ("dense", "low_rank", "sparse_rows", "key_value", "adapter")
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("kind", STORED)
def test_numbers_of_every_width_act_and_come_off(kind: str, branch: bool, tmp_path: Path) -> None:
    tokens = torch.tensor([[5, 9, 3]])
    with Editor(*build("gpt2"), guards=QUIET, branch=branch) as editor:
        editor.edit(ADA, method="toy-low-rank")  # beside one in fp32
        base, said = state_of(editor.model), editor.model.module(tokens).logits
        for dtype in FLOATS:
            (edit,) = editor.apply(file_of(tmp_path, editor, parts(kind, dtype), names=(WEIGHT,)))
            acts = editor.model.module(tokens).logits
            assert bool(torch.isfinite(acts).all())
            assert not torch.equal(acts, said)
            assert editor.verify() == []
            editor.revert(edit)
            assert_same(state_of(editor.model), base)


def test_a_delta_of_narrow_numbers_is_what_their_values_say(editor: Editor, tmp_path: Path) -> None:
    part = parts("dense", torch.float8_e4m3fn)
    before = editor.model.parameter(WEIGHT).detach().clone()
    editor.apply(file_of(tmp_path, editor, part, names=(WEIGHT,)))
    wanted = before + part.tensors[WEIGHT].float()
    assert torch.equal(editor.model.parameter(WEIGHT), wanted)


def spoiled(kind: str, how: str) -> tuple[content.Parts, str]:
    """Return parts that no delta may have, and what the error says."""
    if how in ("complex64", "int8", "bool"):
        return parts(kind, getattr(torch, how)), "floating point"
    part = parts(kind, torch.float8_e5m2 if how == "inf" else torch.float32)
    tensors = dict(part.tensors)
    name = [key for key in tensors if tensors[key].is_floating_point()][-1]
    tensor = tensors[name].clone()
    if how in ("nan", "inf"):
        tensor.reshape(-1)[0:1] = torch.tensor([float(how)]).to(tensor.dtype)
        says = "NaN or infinite"
    else:
        tensor = torch.cat([tensor, tensor], dim=-1)
        says = "shape|rank|agree|numbers"
    return part._replace(tensors={**tensors, name: tensor}), says


@pytest.mark.parametrize("kind", STORED)
def test_numbers_that_no_change_can_have_are_refused_by_name(
    kind: str, editor: Editor, tmp_path: Path
) -> None:
    base, good = state_of(editor.model), parts("dense", torch.float32)
    for how in ("complex64", "int8", "bool", "nan", "inf", "shape"):
        part, says = spoiled(kind, how)
        with pytest.raises(IntegrityError, match=says):
            editor.apply(file_of(tmp_path, editor, good, part, names=(WEIGHT,)))
        assert editor.log() == []
        assert_same(state_of(editor.model), base)


@pytest.mark.parametrize(
    ("kind", "name"),
    # An adapter is on a module: none names a bias.
    [(k, n) for k in STORED for n in (NORM, BIAS) if (k, n) != ("adapter", BIAS)],
)
def test_vectors_take_the_kinds_that_can_change_them(
    kind: str, name: str, editor: Editor, tmp_path: Path
) -> None:
    base = state_of(editor.model)
    file = file_of(tmp_path, editor, parts(kind, torch.float32, name), names=(name,))
    if kind in ("dense", "sparse_rows"):
        editor.apply(file)
        assert not torch.equal(editor.model.parameter(name), base[name])
        assert editor.verify() == []
    else:
        with pytest.raises(IntegrityError, match=r"no matrix|linear modules only"):
            editor.apply(file)
        assert editor.log() == []
        assert_same(state_of(editor.model), base)


@pytest.mark.parametrize("names", [(), ("transformer.h.1.mlp.c_proj.weight",)])
def test_a_fingerprint_covers_what_the_edit_touches(
    names: tuple[str, ...], editor: Editor, tmp_path: Path
) -> None:
    for fields in ({}, {"fingerprint": {}}):
        file = file_of(tmp_path, editor, parts("dense", torch.float32), names=names, **fields)
        for take in (editor.apply, editor.import_):
            with pytest.raises(IntegrityError, match=f"no fingerprint of .*{WEIGHT}"):
                take(file)
    assert editor.log() == []


def test_a_file_brings_no_artifact_that_its_edits_do_not_need(
    editor: Editor, tmp_path: Path
) -> None:
    made = Artifacts(tmp_path / "made")
    made.save(("second_moment", "0"), {"c": torch.eye(2)}, {})
    name = made.name(("second_moment", "0"))
    file = file_of(
        tmp_path, editor, parts("dense", torch.float32), names=(WEIGHT,),
        artifacts={name: made.digest(name)},
    )  # fmt: skip
    with pytest.raises(IntegrityError, match="other artifacts"):
        editor.apply(file)
    assert editor.model.artifacts.digest(name) is None
    assert editor.log() == []


@pytest.mark.parametrize("ledger", [None, "ledger"])
@pytest.mark.parametrize("when", ["overflow", "observer"])
def test_a_file_is_applied_whole_or_not_at_all(
    when: str, ledger: str | None, tmp_path: Path
) -> None:
    class Nosy:
        @hookimpl
        def apply(self, edits: Any) -> None:
            if when == "observer" and len(edits) == 2:
                raise ZeroDivisionError("seen")

    folder = None if ledger is None else tmp_path / ledger
    with Editor(*build("gpt2"), guards=QUIET, observers=[Nosy()], ledger=folder) as editor:
        kept = editor.edit(ADA, method="toy-low-rank")
        before = state_of(editor.model)
        second = parts("sparse_rows", torch.float32)
        if when == "overflow":
            values = torch.full_like(second.tensors[f"{WEIGHT}:values"], 3e38)
            both = [second._replace(tensors={**second.tensors, f"{WEIGHT}:values": values})] * 2
        else:
            both = [parts("dense", torch.float32), second]
        file = file_of(tmp_path, editor, *both, names=(WEIGHT,))
        wrong = {"overflow": IntegrityError, "observer": PluginError}[when]
        said = [(entry.edit.id, entry.active) for entry in editor.log()]
        with pytest.raises(wrong):
            editor.apply(file)
        assert [(entry.edit.id, entry.active) for entry in editor.log()] == said
        assert_same(state_of(editor.model), before)
        assert editor.verify() == []
        assert editor.model.stack.ids[0] == kept.id
