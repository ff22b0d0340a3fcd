"""Tokens as units: model and tokenizer shrink together, and the rest of the model is what it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from test_vocabulary import OTHER, USED, bert, qwen, roberta, sentences, t5
from tiny import tiny_batch, tiny_model
from transformers import AutoConfig, AutoTokenizer

from hf_prune import PruningConfig, describe, prune, save_pretrained
from hf_prune.plan import Kept, PruningPlan
from hf_prune.report.card import write_card

SIZES = {
    "bert": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "roberta": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 48},
    "llama": {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "t5": {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48},
    "bart": {
        "encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    },
}  # fmt: skip
CASES = [
    ("bert", "BertForSequenceClassification", bert, {}),
    ("bert", "BertForMaskedLM", bert, {}),
    ("roberta", "RobertaForMaskedLM", roberta, {}),
    ("gpt2", "GPT2LMHeadModel", qwen, {}),
    ("llama", "LlamaForCausalLM", qwen, {"tie_word_embeddings": False}),
    ("llama", "LlamaForCausalLM", qwen, {"tie_word_embeddings": True}),
    ("t5", "T5ForConditionalGeneration", t5, {}),
    ("bart", "BartForConditionalGeneration", t5, {}),
]


def model_for(family, name, tokenizer, spare=3, **changes):
    """A tiny model with an embedding for this tokenizer, and a few rows of padding."""
    ids = {key: value for key in ("pad", "bos", "eos") if (value := getattr(tokenizer, f"{key}_token_id")) is not None}
    start = {"decoder_start_token_id": tokenizer.pad_token_id} if family in ("t5", "bart") else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + spare,
        **(SIZES[family] | changes),
        **{f"{key}_token_id": value for key, value in ids.items()},
        **start,
    )
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def rows(model, tokenizer, texts):
    """A batch of texts, with what the model needs besides."""
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt", truncation=True, max_length=32))
    batch = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        batch["labels"] = batch["input_ids"].clone()
    return batch


def outputs(model, batch):
    inputs = dict(batch)
    if "labels" in inputs:
        inputs["decoder_input_ids"] = inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize(("family", "name", "make", "changes"), CASES)
def test_only_unused_tokens_go(family, name, make, changes, tmp_path):
    tokenizer = make()
    model = model_for(family, name, tokenizer, **changes)
    dense, batch = copy.deepcopy(model), rows(model, tokenizer, USED)
    config = PruningConfig(keep=1.0, metric="params", units=["tokens"], criterion="magnitude")
    result = prune(model, [batch], config, processing_class=tokenizer, vocabulary=USED)
    kept, small = result.plan[()].kept, result.processing_class
    assert len(small) == len(kept) < len(tokenizer)
    assert [small.tokenize(text) for text in USED] == [tokenizer.tokenize(text) for text in USED]
    wanted, found = outputs(dense, batch), outputs(model, rows(model, small, USED))
    if model.get_output_embeddings() is not None:
        wanted = wanted[..., list(kept)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert result.report["after"]["params_model"] == sum(p.numel() for p in model.parameters())
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(kept)
    assert model.config.hf_prune["shapes"] == "stock"

    save_pretrained(model, tmp_path / "small")
    reopened = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert [reopened(text)["input_ids"] for text in OTHER] == [small(text)["input_ids"] for text in OTHER]
    reloaded = type(model).from_pretrained(tmp_path / "small")
    torch.testing.assert_close(outputs(reloaded, rows(model, reopened, USED)), found, rtol=0, atol=0)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        old, new = (getattr(each.config, key, None) for each in (dense, reloaded))
        assert (old is None) == (new is None)
        if old is not None:
            assert small.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)


def test_a_language_model_writes_what_it_wrote(tmp_path):
    tokenizer = qwen()
    model = model_for("llama", "LlamaForCausalLM", tokenizer)
    ids = tokenizer("Walking house", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    batch = rows(model, tokenizer, USED)
    allowed = sorted({*batch["input_ids"].flatten().tolist(), *ids["input_ids"][0].tolist()})
    config = PruningConfig(keep=1.0, units=["tokens"], criterion="magnitude")
    dense = copy.deepcopy(model)
    result = prune(model, [batch], config, processing_class=tokenizer, vocabulary=[*USED, "Walking house"])
    kept = result.plan[()].kept
    assert {*allowed} <= {*kept}
    banned = [i for i in range(dense.config.vocab_size) if i not in kept]
    wrote = tokenizer.decode(dense.generate(**ids, suppress_tokens=banned, **options)[0])
    new = result.processing_class
    assert new.decode(model.generate(**new("Walking house", return_tensors="pt"), **options)[0]) == wrote


def test_tokens_and_neurons_share_a_budget(tmp_path):
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer, max_position_embeddings=40)
    texts = sentences(64, seed=3)
    batch = {**rows(model, tokenizer, texts), "labels": torch.arange(64) % 2}
    config = PruningConfig(keep=0.6, metric="bytes", units=["neurons", "tokens"], align=1, repair="none", candidates=3)
    result = prune(model, [batch], config, processing_class=tokenizer, vocabulary=texts)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size == pytest.approx(result.report["keep"] * 4 * result.report["before"]["params_model"])
    assert result.report["keep"] <= 0.6
    tried = result.report["divisions"]
    assert len({row["kept"]["tokens"][0] for row in tried}) > 1
    best = min(tried, key=lambda row: row["held_out_loss"])
    assert len(result.plan[()].kept) == best["kept"]["tokens"][0]
    save_pretrained(model, tmp_path / "small")
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert outputs(model, rows(model, small, texts)).isfinite().all()


def test_the_card_says_which_layers_and_tokens_went(tmp_path):
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer, max_position_embeddings=40)
    before, texts = model.config.vocab_size, sentences(64, seed=3)
    batch = {**rows(model, tokenizer, texts), "labels": torch.arange(64) % 2}
    plan = PruningPlan(
        "bert",
        (
            Kept(("encoder",), "layers", 2, (1,)),
            Kept((), "tokens", before, tuple(range(len(tokenizer) - 1))),
            Kept(("encoder", 1, "attention"), "heads", 4, (0, 1, 2, 3)),
            Kept(("encoder", 1, "ffn"), "neurons", 48, tuple(range(48))),
        ),
    )
    config = PruningConfig(criterion="magnitude", repair="none")
    prune(model, [batch], config, processing_class=tokenizer, plan=plan)
    save_pretrained(model, tmp_path / "small")
    text = write_card(tmp_path / "small").read_text()
    assert "| layers of the encoder | 2 | 1 |" in text
    assert f"| tokens | {before:,} | {len(tokenizer) - 1:,} |" in text


def test_without_texts_the_ids_of_all_data_count():
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer)
    batches = [rows(model, tokenizer, USED[i : i + 4]) for i in range(0, 24, 4)]
    config = PruningConfig(keep=1.0, units=["tokens"], criterion="magnitude", calibration_samples=8)
    result = prune(model, batches, config, processing_class=tokenizer)
    used = {i for batch in batches for i in batch["input_ids"].flatten().tolist()}
    assert used <= {*result.plan[()].kept}


def test_a_plan_is_replayed_with_its_tokenizer(tmp_path):
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer)
    twin, batch = copy.deepcopy(model), rows(model, tokenizer, USED)
    config = PruningConfig(keep=1.0, units=["tokens"], criterion="magnitude")
    first = prune(model, [batch], config, processing_class=tokenizer, vocabulary=USED)
    plan = PruningPlan.from_json(first.plan.to_json())
    with pytest.raises(ValueError, match="processing_class="):
        prune(twin, [batch], config, plan=plan)
    second = prune(twin, [batch], config, plan=plan, processing_class=tokenizer)
    assert second.processing_class.get_vocab() == first.processing_class.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_vocabularies_compose(tmp_path):
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer)
    dense, batch = copy.deepcopy(model), rows(model, tokenizer, USED)
    config = PruningConfig(keep=1.0, units=["tokens"], criterion="magnitude")
    first = prune(model, [batch], config, processing_class=tokenizer, vocabulary=USED).processing_class
    save_pretrained(model, tmp_path / "once")
    reloaded = type(model).from_pretrained(tmp_path / "once")
    few = USED[:5]
    prune(reloaded, [rows(model, first, USED)], config, processing_class=first, vocabulary=few)
    composed = reloaded._hf_prune.plan[()]
    assert composed.of == dense.config.vocab_size
    rows_kept = dense.get_input_embeddings().weight[list(composed.kept)]
    assert torch.equal(reloaded.get_input_embeddings().weight, rows_kept)


def test_the_old_tokenizer_is_not_saved_beside_the_new_vocabulary(tmp_path):
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer)
    config = PruningConfig(keep=1.0, units=["tokens"], criterion="magnitude")
    prune(model, [rows(model, tokenizer, USED)], config, processing_class=tokenizer, vocabulary=USED)
    with pytest.raises(ValueError, match=r"was shortened to \d+\. Leave it out"):
        save_pretrained(model, tmp_path / "small", processing_class=tokenizer)


# --- refused, before anything changes --------------------------------------------------------------------------------


def refused(match, model, tokenizer, texts=USED, **fields):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = PruningConfig(**{"keep": 1.0, "units": ["tokens"], "criterion": "magnitude", **fields})
    ids = torch.randint(5, 60, (8, 6))
    with pytest.raises(ValueError, match=match):
        prune(model, [{"input_ids": ids}], config, processing_class=tokenizer, vocabulary=texts)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_tokenizer():
    refused("Give processing_class=tokenizer", model_for("bert", "BertForSequenceClassification", bert()), None)


def test_a_tokenizer_of_another_model():
    model = tiny_model("bert")
    refused("another model", model, bert())


def test_texts_that_use_no_token():
    tokenizer = bert()
    refused("No token is used", model_for("bert", "BertForSequenceClassification", tokenizer), tokenizer, [""])


def test_a_budget_below_what_cannot_go():
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer)
    refused(r"3 tokens are too few: \d+ cannot go", model, tokenizer, max_tokens=3)


def test_a_target_that_tokens_cannot_reach():
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer)
    refused("cannot be reached", model, tokenizer, keep=0.2, metric="params")


def test_a_model_without_words():
    model = tiny_model("vit")
    config = PruningConfig(units=["tokens"])
    with pytest.raises(ValueError, match="a vit has no vocabulary"):
        prune(model, [tiny_batch(model)], config, processing_class=bert(), vocabulary=USED)


def test_a_plan_that_drops_what_the_config_names():
    tokenizer = bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer)
    anatomy = describe(model)
    sites = [Kept(s.key, s.inner.name, n := s.sizes[s.inner.name], range(n)) for s in anatomy.sites]
    kept = [i for i in range(model.config.vocab_size) if i != model.config.pad_token_id]
    plan = PruningPlan("bert", (Kept((), "tokens", model.config.vocab_size, tuple(kept)), *sites))
    with pytest.raises(ValueError, match=r"drops tokens \[\d+\] .* cannot go"):
        prune(
            model, [rows(model, tokenizer, USED)], PruningConfig(repair="none"), plan=plan, processing_class=tokenizer
        )
