"""GGUF files: read back by transformers' own GGUF reader with the same outputs, and run by llama.cpp where it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny_text
import torch
from tiny import tiny_batch, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_prune import PruningConfig, prune
from hf_prune.export.gguf import ARCHITECTURES, interleave, to_gguf

gguf = pytest.importorskip("gguf", reason="needs hf-prune[gguf]")

ROOT = Path(__file__).parents[1]
CONFIG = {"keep": 0.6, "align": 4, "calibration_samples": 64, "sequence_length": 12}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with the vocabulary of the tiny models."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[BOS]", "[EOS]"]
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=special, initial_alphabet=[], show_progress=False)
    backend.train_from_iterator(tiny_text.sentences(50), trainer)
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def sentencepiece():
    """The same text in the manner of Llama 2: spaces as marks, bytes for what is unknown."""
    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = marked
    trained.train_from_iterator(tiny_text.sentences(50), trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    merges = [tuple(pair) for pair in learnt["merges"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = marked
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def unigram_tokenizer(*steps, split=None):
    """The same text in the manner of T5: a score for each piece, and the most likely pieces."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = split or pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    given = {"vocab_size": 200, "special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    backend.train_from_iterator(tiny_text.sentences(50), trainers.UnigramTrainer(**given))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def llama(words):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, num_hidden_layers=1, **sizes))


def small(family, shapes):
    model = tiny_model(family, CLASSES[family])
    prune(model, [tiny_batch(model, 64)], PruningConfig(shapes=shapes, **CONFIG))
    return model.eval()


def test_every_row_is_a_family_of_ours():
    assert set(ARCHITECTURES) == set(CLASSES)


def test_interleave_pairs_the_halves_of_each_head():
    weight = torch.arange(8)[:, None]  # two heads of four rows
    assert interleave(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_transformers_reads_it_back(tmp_path, family, tokenizer):
    model = small(family, "uniform")
    to_gguf(model, tmp_path / "m.gguf", tokenizer, dtype="f32")
    known = {} if family in ("llama", "mistral", "qwen2") else {"config": model.config}  # all it cannot read
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **known).eval()
    ids = torch.arange(8, 24).reshape(2, 8)
    with torch.no_grad():
        ours, theirs = model(ids).logits, again(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_layers_of_different_sizes_become_lists(tmp_path, tokenizer):
    model = small("llama", "per_layer")
    to_gguf(model, tmp_path / "m.gguf", tokenizer)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.architecture").contents() == "deci"
    widths = reader.get_field("deci.feed_forward_length").contents()
    assert widths == [layer.mlp.gate_proj.out_features for layer in model.model.layers]


def test_merges_in_their_order(tmp_path, sentencepiece):
    to_gguf(llama(len(sentencepiece)), tmp_path / "m.gguf", sentencepiece)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens, scores = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "scores"))
    merges = json.loads(sentencepiece.backend_tokenizer.to_str())["model"]["merges"]
    found = [scores[tokens.index("".join(pair))] for pair in merges]
    assert len(merges) > 20
    assert found == sorted(found, reverse=True)
    assert min(found) > scores[tokens.index("<0x41>")]
    assert reader.get_field("tokenizer.ggml.add_space_prefix").contents() is True


def test_pieces_and_their_scores(tmp_path):
    tokenizer = unigram_tokenizer()
    to_gguf(llama(len(tokenizer) + 2), tmp_path / "m.gguf", tokenizer)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    said = {key: reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("model", "tokens", "scores")}
    assert said["model"] == "t5"
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    padding = [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert said["tokens"] == [*(text for text, _ in vocabulary), "<extra>", *padding]
    assert said["scores"][: len(vocabulary)] == pytest.approx([score for _, score in vocabulary])
    types = [gguf.TokenType(number).name for number in reader.get_field("tokenizer.ggml.token_type").contents()]
    assert types[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "NORMAL"]
    assert types[-3:] == ["USER_DEFINED", "UNUSED", "UNUSED"]
    for key in ("add_space_prefix", "remove_extra_whitespaces"):
        assert reader.get_field(f"tokenizer.ggml.{key}").contents() is True
    for key in ("add_bos_token", "add_eos_token"):
        assert reader.get_field(f"tokenizer.ggml.{key}").contents() is False


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (lambda: unigram_tokenizer(normalizers.Lowercase()), "Lowercase"),
        (lambda: unigram_tokenizer(normalizers.Replace("a", "b")), "Replace"),
        (lambda: unigram_tokenizer(split=pre_tokenizers.Whitespace()), "Whitespace"),
        (lambda: unigram_tokenizer(split=pre_tokenizers.WhitespaceSplit()), "no Metaspace"),
    ],
)
def test_a_unigram_tokenizer_that_does_more_is_refused(tmp_path, tokenizer, named):
    made = tokenizer()
    with pytest.raises(ValueError, match=f"no more than a table of characters are written; this one has {named}"):
        to_gguf(llama(len(made)), tmp_path / "m.gguf", made)
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_cannot_build_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"builds every layer of a qwen2 alike.*shapes='uniform'"):
        to_gguf(small("qwen2", "per_layer"), tmp_path / "m.gguf", tokenizer)
    with pytest.raises(ValueError, match="no row for 'bert'; known: llama"):
        to_gguf(tiny_model("bert"), tmp_path / "m.gguf", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_way_to_split_text_is_refused(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    by_words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+"), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_words, bytewise])
    with pytest.raises(ValueError, match="this tokenizer's is not known here"):
        to_gguf(small("qwen2", "uniform"), tmp_path / "m.gguf", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_overwritten(tmp_path, tokenizer):
    (tmp_path / "m.gguf").write_text("here")
    with pytest.raises(FileExistsError, match="exists"):
        to_gguf(tiny_model("llama", "LlamaForCausalLM"), tmp_path / "m.gguf", tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_llama_cpp_splits_text_in_the_same_way(tmp_path, sentencepiece, kind):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-llama-cpp")
    tokenizer = sentencepiece if kind == "sentencepiece" else unigram_tokenizer()
    to_gguf(llama(len(tokenizer)), tmp_path / "m.gguf", tokenizer)
    opened = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in [*tiny_text.sentences(20), "Unseen: Ünïcode, and  two spaces."]:
        assert opened.tokenize(text.encode(), add_bos=False) == tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_llama_cpp_gives_the_same_tokens_and_gives_them_faster(tmp_path, monkeypatch):
    """SmolLM2 and its cut to 80% in stock shapes, both made by examples/smollm2.py."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-llama-cpp")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from serve_llama_cpp import main

    dense, pruned = ROOT / ".cache" / "smollm2", ROOT / ".cache" / "smollm2-kv"
    if not pruned.is_dir():
        pytest.skip("no pruned SmolLM2: make test-llama-cpp")
    found = main([str(dense), str(pruned), "--out", str(tmp_path)])
    for name in ("smollm2", "smollm2-kv"):
        assert found[name]["same_tokens"] == found[name]["of"]
    assert found["smollm2-kv"]["prompt_speedup"] > 1
    assert found["smollm2-kv"]["token_speedup"] > 1
