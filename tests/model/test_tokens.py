"""Subjects and targets are found by characters, on every kind of tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from errata.errors import ConfigError, RequestError, UnknownNameError
from errata.model.joining import join
from errata.model.prompts import IGNORED, TokenError
from errata.model.task import TASKS
from errata.model.tokens import (
    encode,
    encode_masked,
    encode_next,
    encode_seq2seq,
    encode_targets,
    subject_position,
    subject_span,
    tokenise,
    tokenizer_for,
)
from tests.families import DECODERS, STYLES, build, build_tokenizer, sampled
from tests.helpers import shared_path

REAL = ("real-gpt2", "real-t5", "real-bert")
ALL = (*STYLES, *REAL)
CAUSAL = ("bytes", "bytes-bos", "bytes-untrimmed", "sentencepiece", "llama", "real-gpt2")
WITH_BOS = ("bytes-bos", "sentencepiece", "llama", "wordpiece", "roberta", "real-bert")

PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
words = st.text(
    st.sampled_from("abcdeinorstPLMZ0195éßüÅ'-.,&Ж東京🙂ﬁ½İ가"), min_size=1, max_size=9
)  # fmt: skip
subjects = st.lists(words, min_size=1, max_size=3).map(" ".join)
contexts = st.lists(words, max_size=4).map(" ".join)


@cache
def _tokenizer(style):
    if style == "real-gpt2":
        file = shared_path("data", "tokenizers", "gpt2", "tokenizer.json")
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(file), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        )
    if style == "real-t5":
        folder = shared_path("data", "tokenizers", "t5")
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        )  # fmt: skip
    if style == "real-bert":
        file = shared_path("data", "tokenizers", "bert-base-uncased", "vocab.txt")
        return transformers.BertTokenizerFast(vocab=str(file))
    return build_tokenizer(style)


def _pieces(tokenizer, ids):
    return [str(piece).strip("▁Ġ#") for piece in tokenizer.convert_ids_to_tokens(ids)]


# -- subjects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ALL)
@pytest.mark.parametrize(
    ("template", "subject"),
    [
        ("{} is in France", "Paris"),
        ("The city of {} is in France", "Paris"),
        ("The Eiffel Tower is in {}", "Paris"),
        ("Paris is the capital; {} is in France", "Paris"),
        ("{} is the capital; Paris is in France", "Paris"),
        ("({}) is in France", "Paris"),
        ('"{}", they said', "the city of Paris"),
    ],
)
def test_the_last_token_of_the_subject_ends_where_the_subject_ends(style, template, subject):
    tokenizer = _tokenizer(style)
    first, last = subject_span(tokenizer, template, subject)
    (row,) = tokenise(tokenizer, [template.replace("{}", subject)])
    start = template.index("{}")
    assert row.offsets[last][1] == start + len(subject)
    assert row.offsets[first][0] in (start, start - 1)  # a leading space may count in
    covered = "".join(_pieces(tokenizer, row.ids[first : last + 1])).lower()
    assert covered == subject.replace(" ", "").lower()
    assert subject_position(tokenizer, template, subject) == last
    assert subject_position(tokenizer, template, subject, "first") == first


@pytest.mark.parametrize("style", ALL)
@PROPERTY
@given(before=contexts, subject=subjects, after=contexts, glued=st.booleans())
def test_the_span_covers_the_subject_and_no_token_more(style, before, subject, after, glued):
    tokenizer = _tokenizer(style)
    gap = "" if glued else " "
    template = f"{before}{gap}{{}}{gap}{after}"
    text, start = template.replace("{}", subject), template.index("{}")
    end = start + len(subject)
    first, last = subject_span(tokenizer, template, subject)
    (row,) = tokenise(tokenizer, [text])
    assert row.begin <= first <= last < row.stop
    spans = [row.offsets[index] for index in range(first, last + 1)]
    # Every character of the subject that any token has is in the span's tokens …
    held = {c for a, b in spans for c in range(a, b)}
    anywhere = {c for a, b in row.offsets[row.begin : row.stop] for c in range(a, b)}
    missing = {c for c in range(start, end) if text[c] != " "} & (anywhere - held)
    assert not missing
    # … and both of its ends have characters of the subject.
    for a, b in (spans[0], spans[-1]):
        assert a < end
        assert b > start
    # Without merging over the boundary, the text of the span is the subject.
    shown = text[spans[0][0] : spans[-1][1]]
    if not glued and max(b - a for a, b in row.offsets) < 3:
        assert shown.strip() == subject


@pytest.mark.parametrize("style", ALL)
@PROPERTY
@given(subject=subjects, after=contexts)
def test_the_place_counts_and_not_the_words(style, subject, after):
    """A subject that stands twice in the prompt is found where the template has its place."""
    tokenizer = _tokenizer(style)
    early = subject_position(tokenizer, f"{{}} , {subject} {after}", subject)
    late = subject_position(tokenizer, f"{subject} , {{}} {after}", subject)
    assert early < late


def test_a_subject_merged_with_its_neighbours_ends_in_the_shared_token():
    gpt2 = _tokenizer("real-gpt2")
    template = "The city of {}celona is"
    first, last = subject_span(gpt2, template, "Bar")
    assert first == last
    assert gpt2.decode(encode(gpt2, ["The city of Barcelona is"]).input_ids[0][last]) == (
        " Barcelona"
    )


@pytest.mark.parametrize("style", ["bytes", "bytes-untrimmed", "sentencepiece", "llama"])
def test_a_character_of_several_tokens_belongs_whole_to_the_subject(style):
    tokenizer = _tokenizer(style)
    first, last = subject_span(tokenizer, "In {} it rains", "東京")
    assert last - first + 1 >= 6  # three bytes each
    (row,) = tokenise(tokenizer, ["In 東京 it rains"])
    assert row.offsets[last + 1][0] >= 5


@pytest.mark.parametrize("style", ["sentencepiece", "llama", "unigram", "real-t5"])
def test_the_lone_space_mark_at_the_start_is_not_the_subject(style):
    tokenizer = _tokenizer(style)
    (row,) = tokenise(tokenizer, ["Xi is"])
    first = subject_position(tokenizer, "{} is", "Xi", "first")
    pieces = tokenizer.convert_ids_to_tokens(row.ids)
    assert pieces[first].strip("▁")


@pytest.mark.parametrize("style", ALL)
def test_positions_around_the_subject(style):
    tokenizer = _tokenizer(style)
    template, subject = "The city of {} is in", "Paris"
    (row,) = tokenise(tokenizer, [template.replace("{}", subject)])
    last = subject_position(tokenizer, template, subject)
    assert subject_position(tokenizer, template, subject, "first_after_last") == last + 1
    end = subject_position(tokenizer, template, subject, "last_of_prompt")
    assert row.offsets[end][1] == len("The city of Paris is in")
    # Where nothing follows the subject, it is the subject's own last token.
    at_end = subject_position(tokenizer, "The city of {}", subject, "first_after_last")
    assert at_end == subject_position(tokenizer, "The city of {}", subject)


def test_white_space_around_a_subject_is_not_part_of_it():
    tokenizer = _tokenizer("bytes")
    assert subject_span(tokenizer, "In{}is", " Paris ") == subject_span(
        tokenizer, "In {} is", "Paris"
    )


def test_impossible_subjects_say_why():
    tokenizer = _tokenizer("bytes")
    for template in ("no place", "{} and {}"):
        with pytest.raises(TokenError, match=r"exactly one \{\}"):
            subject_span(tokenizer, template, "x")
    with pytest.raises(RequestError, match="empty"):
        subject_span(tokenizer, "{} is", "  ")
    with pytest.raises(TokenError, match="the tokenizer drops it"):
        subject_span(_tokenizer("wordpiece"), "a {} b", "\x00")
    with pytest.raises(UnknownNameError, match=r"'lastt'.*Did you mean 'last'"):
        subject_position(tokenizer, "{} is", "x", "lastt")


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"Slow is a slow tokenizer.*tokenizer\.json"):
        encode(Slow(), ["x"])


# -- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ALL)
def test_special_tokens_are_those_of_a_prompt(style):
    tokenizer = tokenizer_for(_tokenizer(style), "causal" if style in CAUSAL else "seq2seq")
    ids = encode(tokenizer, ["Paris is in"]).input_ids[0].tolist()
    added = [i for i in ids if i in tokenizer.all_special_ids]
    full = tokenizer("Paris is in", add_special_tokens=True)["input_ids"]
    if style in CAUSAL:  # a decoder's prompt goes on: no closing token
        assert added == ([tokenizer.bos_token_id] if style in WITH_BOS else [])
    else:
        assert ids == full
    assert encode(tokenizer, ["Paris is in"], keep_end=True).input_ids[0].tolist() == full


@pytest.mark.parametrize("style", ["wordpiece", "roberta", "unigram", "real-t5"])
def test_whether_a_prompt_ends_is_the_tasks_to_say(style):
    """Whatever tokens the tokenizer knows: a mask, T5's sentinels, or neither."""
    full = _tokenizer(style)("Paris is in")["input_ids"]
    for task in TASKS:
        tokenizer = tokenizer_for(_tokenizer(style), task)
        ids = encode(tokenizer, ["Paris is in"]).input_ids[0].tolist()
        assert ids == (full[:-1] if task == "causal" else full)
        (row,) = tokenise(tokenizer, ["Paris is in"])
        assert row.ids == ids
        if task != "masked":
            assert encode_next(tokenizer, ["Paris is in"], task).tokens(0) == ids


def test_a_closing_token_in_the_text_stays():
    tokenizer = _tokenizer("bytes")
    ids = encode(tokenizer, ["Paris<|endoftext|>"]).input_ids[0].tolist()
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_positions_count_real_tokens(side):
    tokenizer = _tokenizer("bytes-bos")
    texts = ["Paris", "The capital of France is Paris"]
    batch = encode(tokenizer, texts, padding_side=side)
    assert len(batch) == 2
    for row, text in enumerate(texts):
        alone = encode(tokenizer, [text])
        length = batch.lengths[row]
        columns = [batch.column(row, index) for index in range(length)]
        assert batch.input_ids[row, columns].tolist() == alone.input_ids[0].tolist()
        assert batch.position_ids[row, columns].tolist() == list(range(length))
        assert batch.attention_mask[row].sum() == length
        assert batch.attention_mask[row, columns].all()
        assert batch.column(row, -1) == columns[-1]
        with pytest.raises(TokenError, match="out of range"):
            batch.column(row, length)
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.lengths == batch.lengths


def test_a_bad_batch_says_why():
    tokenizer = _tokenizer("bytes")
    with pytest.raises(UnknownNameError, match="padding side 'centre'"):
        encode(tokenizer, ["x"], padding_side="centre")
    with pytest.raises(TokenError, match="at least one text"):
        encode(tokenizer, [])
    with pytest.raises(TokenError, match="at least one text"):
        encode(tokenizer, "one string")
    with pytest.raises(TokenError, match="gives no token"):
        encode(tokenizer, ["x", ""])


@pytest.mark.parametrize("family", sampled(DECODERS))
def test_left_and_right_padding_give_the_same_logits(family):
    module, tokenizer = build(family)
    texts = ["Paris", "The capital of France is Paris, a city"]
    takes = family != "bloom"
    last = []
    for side in ("left", "right"):
        batch = encode(tokenizer, texts, padding_side=side)
        with torch.no_grad():
            logits = module(**batch.inputs(positions=takes), use_cache=False).logits
        last.append(torch.stack([logits[row, batch.column(row, -1)] for row in range(2)]))
    torch.testing.assert_close(last[0], last[1], rtol=1e-4, atol=1e-4)


# -- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ALL)
def test_a_target_is_what_follows_the_prompt(style):
    tokenizer = _tokenizer(style)
    prompts = ["The Eiffel Tower is in", "Paris is in"]
    targets = ["Rome, Italy", "France"]
    batch = encode_targets(tokenizer, prompts, targets)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        start, end = batch.target_spans[row]
        columns, ids = batch.targets()[row]
        assert batch.ends[row] == start - 1
        alone = encode(tokenizer, [prompt], keep_end=False)
        whole = encode(tokenizer, [f"{prompt} {target}"], keep_end=False)
        assert alone.lengths == [start]
        assert whole.lengths == [end] == [len(batch.tokens(row))]
        assert whole.input_ids[0, start:end].tolist() == ids
        assert columns == list(range(start - 1, end - 1))
        assert tokenizer.decode(ids).strip().lower() == target.lower()


@pytest.mark.parametrize("style", ALL)
@PROPERTY
@given(prompt=subjects, target=subjects)
def test_prompt_and_target_make_up_the_joint_tokens(style, prompt, target):
    tokenizer = _tokenizer(style)
    assume(encode(tokenizer, [prompt], keep_end=False).lengths[0] > 0)
    text = join(prompt, target)
    batch = encode_targets(tokenizer, [prompt], [target])
    (start, end) = batch.target_spans[0]
    (row,) = tokenise(tokenizer, [text], keep_end=False)
    assert 0 < start < end == len(row.ids)
    assert row.ids == batch.input_ids[0].tolist()
    assert row.ids[start:end] == batch.labels.tolist()
    # No token before the target has characters of it, and each of its own begins after the prompt.
    boundary = len(prompt)
    assert all(b <= boundary + 1 for _, b in row.offsets[:start])
    # Without a space between the two, a token across the boundary is the target's.
    glued = len(text) == len(prompt) + len(target)
    assert all(a >= boundary for a, _ in row.offsets[start + glued : end])


@pytest.mark.parametrize("style", CAUSAL)
def test_spaces_at_the_end_of_a_prompt_are_the_targets(style):
    tokenizer = _tokenizer(style)
    plain = encode_targets(tokenizer, ["Paris is in"], ["France"])
    spaced = encode_targets(tokenizer, ["Paris is in "], ["France"])
    assert torch.equal(plain.input_ids, spaced.input_ids)
    assert plain.target_spans == spaced.target_spans
    given = encode_targets(tokenizer, ["Paris is in"], [" France"])
    assert torch.equal(plain.input_ids, given.input_ids)


def test_a_line_break_at_the_end_of_a_prompt_is_the_prompts():
    tokenizer = _tokenizer("real-gpt2")
    batch = encode_targets(tokenizer, ["Q: Where is Paris?\nA:\n"], ["France"])
    assert tokenizer.decode(batch.labels.tolist()) == "France"


def test_a_token_across_the_boundary_is_the_targets():
    """Made to merge over the space, so that "is in" and its target share a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(["<unk>", "a", "b", "c", "Ġ", "bĠ", "bĠc"])}
    core = Tokenizer(models.BPE(vocabulary, [("b", "Ġ"), ("bĠ", "c")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<unk>")
    merged = encode_targets(tokenizer, ["ab"], ["c"])
    assert tokenizer.convert_ids_to_tokens(merged.labels.tolist()) == ["bĠc"]
    # "bĠ" holds the space but nothing else of the target: there it is the prompt's.
    apart = encode_targets(tokenizer, ["ab"], ["a"])
    assert tokenizer.convert_ids_to_tokens(apart.labels.tolist()) == ["a"]


def test_impossible_targets_say_why():
    tokenizer = _tokenizer("bytes")
    with pytest.raises(TokenError, match="is empty"):
        encode_targets(tokenizer, ["Paris is in"], ["  "])
    with pytest.raises(TokenError, match="nothing predicts its first token"):
        encode_targets(tokenizer, [""], ["France"])
    with pytest.raises(TokenError, match="2 prompts were given, but 1 targets"):
        encode_targets(tokenizer, ["a", "b"], ["c"])
    with pytest.raises(TokenError, match="No token of"):
        encode_targets(_tokenizer("wordpiece"), ["Paris is in"], ["\x00"])
    with_bos = encode_targets(_tokenizer("bytes-bos"), [""], ["France"])
    assert with_bos.ends == [0]


# -- encoders and encoder-decoders ---------------------------------------------------------------


@pytest.mark.parametrize("style", ["wordpiece", "roberta", "real-bert"])
def test_an_encoder_gets_a_mask_for_each_token_of_the_target(style):
    tokenizer = _tokenizer(style)
    mask = tokenizer.mask_token
    prompts = [f"Paris is in {mask}, they said.", "Paris is in"]
    batch = encode_masked(tokenizer, prompts, ["North France", "Italy"])
    for row, target in enumerate(["North France", "Italy"]):
        start, end = batch.target_spans[row]
        columns, ids = batch.targets()[row]
        assert batch.input_ids[row, start:end].unique().tolist() == [tokenizer.mask_token_id]
        assert int((batch.input_ids[row] == tokenizer.mask_token_id).sum()) == end - start
        assert tokenizer.decode(ids).strip().lower() == target.lower()
        assert columns == list(range(start, end))
        filled = torch.tensor(batch.tokens(row))
        filled[start:end] = torch.tensor(ids)
        text = (
            prompts[row].replace(mask, target) if mask in prompts[row] else f"Paris is in {target}"
        )
        assert filled.tolist() == tokenizer(text)["input_ids"]
    with pytest.raises(TokenError, match="2 mask tokens"):
        encode_masked(tokenizer, [f"{mask} is {mask}"], ["x"])
    with pytest.raises(TokenError, match="is empty"):
        encode_masked(tokenizer, ["Paris is in"], [" "])


def test_a_decoder_has_no_mask():
    with pytest.raises(ConfigError, match="has no mask token"):
        encode_masked(_tokenizer("bytes"), ["Paris is in"], ["France"])


@pytest.mark.parametrize("style", ["unigram", "real-t5"])
def test_an_encoder_decoder_reads_the_prompt_and_writes_the_target(style):
    tokenizer = _tokenizer(style)
    targets = ["Rome, Italy", "France"]
    prompts = ["The Eiffel Tower is in", "Paris is in"]
    batch = encode_seq2seq(tokenizer, prompts, targets)
    closed = encode_seq2seq(tokenizer, prompts, targets, closing=True)
    decoder = batch.inputs["decoder_input_ids"]
    for row, target in enumerate(targets):
        start, end = batch.target_spans[row]
        columns, ids = batch.targets()[row]
        assert tokenizer.decode(ids) == target
        assert columns == list(range(start, end))
        assert closed.targets()[row][1] == [*ids, tokenizer.eos_token_id]
        assert decoder[row, 0] == tokenizer.pad_token_id
        assert decoder[row, 1 : end + 1].tolist() == ids
        assert batch.inputs["decoder_attention_mask"][row].sum() == end + 1
        assert batch.tokens(row)[-1] == tokenizer.eos_token_id
        assert batch.ends[row] == len(batch.tokens(row)) - 1


def test_the_logits_at_a_targets_columns_are_its_loss():
    module, tokenizer = build("t5")
    prompts, targets = ["Paris is in", "Rome"], ["France", "Italy, they said"]
    batch = encode_seq2seq(tokenizer, prompts, targets, closing=True)
    assert len(batch) == 2
    labels = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
    labels[labels == tokenizer.pad_token_id] = IGNORED
    with torch.no_grad():
        logits = module(**batch.inputs, use_cache=False).logits[batch.rows, batch.columns]
        wanted = module(**batch.inputs, labels=labels, use_cache=False).loss
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, batch.labels), wanted)


# -- the first token after a prompt ----------------------------------------------------------------


def test_what_predicts_the_next_token_is_read_for_each_task():
    prompts = ["The Eiffel Tower is in", "Paris"]
    causal = encode_next(_tokenizer("bytes"), prompts, "causal")
    assert causal.columns.tolist() == causal.ends
    masked = encode_next(_tokenizer("wordpiece"), [prompts[0], "[MASK] is in Spain"], "masked")
    assert masked.columns.tolist() == [len(masked.tokens(0)) - 2, 1]
    mask = _tokenizer("wordpiece").mask_token_id
    assert masked.input_ids[masked.rows, masked.columns].tolist() == [mask, mask]
    two = encode_next(_tokenizer("unigram"), prompts, "seq2seq", decoder_start=[0, 7])
    assert two.inputs["decoder_input_ids"].tolist() == [[0, 7], [0, 7]]
    assert two.columns.tolist() == [1, 1]
    for batch in (causal, masked, two):
        assert batch.labels.tolist() == [IGNORED, IGNORED]
    with pytest.raises(ConfigError, match="2 mask tokens"):
        encode_next(_tokenizer("wordpiece"), ["[MASK] is [MASK]"], "masked")
