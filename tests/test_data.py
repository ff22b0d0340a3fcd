"""Reading text for calibration and evaluation: what is guessed, what is refused, and what is never seen twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import tiny_text as texts
import torch

from hf_prune.data.evaluation import evaluate
from hf_prune.data.opening import load_model
from hf_prune.data.texts import Source, load_data, read
from hf_prune.model.probe import positions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def classifier():
    return tiny.tiny_model("bert")


def parts(model, path, tokenizer=None, length=16, samples=64, **source):
    return load_data(Source(str(path), **source), model, tokenizer or texts.tokenizer(), length, samples)


def rows(batches):
    """The real tokens of every row."""
    return [
        tuple(ids[mask == 1].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_table_format_gives_the_same_rows(tmp_path, classifier, ending):
    from datasets import Dataset

    data = Dataset.from_list([{"text": t, "label": i % 2} for i, t in enumerate(texts.sentences(60))])
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        data.to_parquet(path)
    elif ending.startswith("json"):
        data.to_json(path)
    else:
        data.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    found = parts(classifier, path)
    assert len(rows(found.evaluation)) == 12
    assert len(rows(found.calibration)) == 48
    assert set(rows(found.calibration)).isdisjoint(rows(found.evaluation))
    assert sorted(rows(found.calibration) + rows(found.evaluation)) == sorted(
        tuple(texts.tokenizer()(t)["input_ids"]) for t in data["text"]
    )


def test_labels_stay_with_their_texts(tmp_path, classifier):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"text": f"w{i} w1", "label": i % 2} for i in range(40)])
    found = parts(classifier, path)
    for batch in found.calibration + found.evaluation:
        number = batch["input_ids"][:, 0] - len(texts.SPECIAL)
        assert torch.equal(number % 2, batch["labels"])


def test_calibration_is_drawn_from_all_of_the_data(tmp_path, classifier):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"text": f"w{i // 10}", "label": 0} for i in range(900)])
    found = parts(classifier, path, samples=90)
    assert len(set(rows(found.calibration))) > 80
    assert rows(found.calibration) == rows(parts(classifier, path, samples=90).calibration)


def test_string_labels_go_through_label2id(tmp_path):
    model = tiny.tiny_model("bert", label2id={"bad": 0, "good": 1}, id2label={0: "bad", 1: "good"})
    found = parts(model, texts.labelled(tmp_path / "a.jsonl", labels=("good", "good", "bad")))
    share = torch.cat([batch["labels"] for batch in found.calibration]).float().mean()
    assert 0.5 < share < 0.8


def test_a_datasets_own_label_numbers_are_translated_by_name(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(text=Value("string"), label=ClassLabel(names=["good", "bad"]))
    data = Dataset.from_dict({"text": texts.sentences(40), "label": [0] * 40}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    model = tiny.tiny_model("bert", label2id={"bad": 0, "good": 1}, id2label={0: "bad", 1: "good"})
    found = parts(model, tmp_path / "a.parquet")
    assert all((batch["labels"] == 1).all() for batch in found.calibration)


def test_running_text_is_packed_in_blocks(tmp_path):
    model = tiny.tiny_model("llama")
    (tmp_path / "a.txt").write_text("\n".join(texts.sentences(200)))
    found = parts(model, tmp_path / "a.txt", length=20)
    for batch in found.calibration + found.evaluation:
        assert batch["input_ids"].shape[1] == 20
        assert batch["attention_mask"].all()
        assert "labels" not in batch
    words = sum(len(text.split()) for text in texts.sentences(200))
    assert len(rows(found.evaluation)) == words // 20 // 5


def test_separate_texts_are_joined_by_the_end_token(tmp_path):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"content": "w1 w2 w3"} for _ in range(100)])
    found = parts(tiny.tiny_model("llama"), path, length=8)
    assert (torch.cat([batch["input_ids"] for batch in found.calibration]) == 2).float().mean() == 0.25


def test_messages_go_through_the_chat_template(tmp_path):
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"messages": talk} for _ in range(60)])
    model = tiny.tiny_model("llama")
    found = parts(model, path, texts.tokenizer(texts.CHAT), length=7)
    unknown = 3  # "user" and "assistant" are no words of the tiny tokenizer
    assert rows(found.calibration)[0].count(unknown) == 2
    with pytest.raises(ValueError, match="no chat template"):
        parts(model, path)


def test_masked_and_paired_models(tmp_path):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"text": t, "summary": "w1 w2"} for t in texts.sentences(60)])
    masked = parts(tiny.tiny_model("bert", "BertForMaskedLM"), path)
    batch = masked.calibration[0]
    hidden = batch["labels"] != -100
    assert hidden.any()
    assert (batch["input_ids"][hidden] == 4).all()
    assert not (hidden & (batch["attention_mask"] == 0)).any()
    paired = parts(tiny.tiny_model("t5"), path, label_column="summary")
    assert evaluate(tiny.tiny_model("t5"), paired.evaluation)[0] == "loss"
    with pytest.raises(ValueError, match="label column"):
        parts(tiny.tiny_model("t5"), path)


def test_what_cannot_be_guessed_lists_the_columns(tmp_path, classifier):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"a": "w1", "b": "w2", "label": 0} for _ in range(30)])
    with pytest.raises(ValueError, match=r"no text column.*Columns: a, b, label.*--text-column"):
        parts(classifier, path)
    with pytest.raises(ValueError, match=r"no column 'c'.*Columns: a, b, label"):
        parts(classifier, path, text_column="c")
    with pytest.raises(ValueError, match=r"no label column.*--label-column"):
        parts(classifier, texts.labelled(tmp_path / "b.jsonl", column="mood"))
    with pytest.raises(ValueError, match="not text in every row"):
        parts(classifier, path, text_column="label")


def test_bad_labels_are_named(tmp_path, classifier):
    path = texts.labelled(tmp_path / "a.jsonl", labels=("great", "LABEL_0"))
    with pytest.raises(ValueError, match=r"does not know: 'great'.*'LABEL_0' \(0\)"):
        parts(classifier, path)
    with pytest.raises(ValueError, match="does not know: 7"):
        parts(classifier, texts.labelled(tmp_path / "b.jsonl", labels=(0, 7)))


def test_bad_files(tmp_path, classifier):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(Source(str(tmp_path / "none.csv")))
    for name, problem in (("a.csv", "is empty"), ("a.docx", "end in .csv")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=problem):
            read(Source(str(tmp_path / name)))
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    with pytest.raises(ValueError, match="cannot be read as json"):
        read(Source(str(tmp_path / "broken.jsonl")))
    with pytest.raises(ValueError, match=r"gives 5 examples.*at least 10"):
        parts(classifier, texts.labelled(tmp_path / "few.jsonl", count=5))
    (tmp_path / "short.txt").write_text("w1 w2 w3\n")
    with pytest.raises(ValueError, match="gives 0 examples"):
        parts(tiny.tiny_model("llama"), tmp_path / "short.txt")


def test_models_without_a_text_recipe_are_refused(tmp_path):
    path = texts.labelled(tmp_path / "a.jsonl")
    for family, name in (("bert", "BertForQuestionAnswering"), ("vit", None)):
        with pytest.raises(ValueError, match="cannot be prepared here"):
            parts(tiny.tiny_model(family, name), path)


def test_accuracy_and_perplexity_are_the_plain_ones():
    classifier, batch = tiny.tiny_model("bert"), None
    batch = tiny.tiny_batch(classifier)
    with torch.no_grad():
        right = classifier(**batch).logits.argmax(-1) == batch["labels"]
    assert evaluate(classifier, [batch, batch]) == ("accuracy", right.float().mean().item())
    lm = tiny.tiny_model("llama").train()
    batch = tiny.tiny_batch(lm)
    metric, value = evaluate(lm, [batch])
    with torch.no_grad():
        expected = lm.eval()(**batch).loss.exp().item()
    assert metric == "perplexity"
    assert value == pytest.approx(expected, rel=1e-5)
    unlabelled = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert evaluate(lm, [unlabelled])[1] == pytest.approx(expected, rel=1e-5)


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny.tiny_model("bert").train()
    evaluate(model, [tiny.tiny_batch(model)])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_no_head_gives_no_metric():
    model = tiny.tiny_model("bert", "BertModel")
    batch = {k: v for k, v in tiny.tiny_batch(model).items() if k != "labels"}
    assert math.isnan(evaluate(model, [batch])[1])


def test_load_model(tmp_path):
    path = texts.checkpoint(tmp_path / "m", "bert")
    assert type(load_model(path)).__name__ == "BertForSequenceClassification"
    assert type(load_model(path, "feature-extraction")).__name__ == "BertModel"
    with pytest.raises(FileNotFoundError, match=r"no directory with a config\.json"):
        load_model(str(tmp_path / "none"))
    config = Path(path, "config.json")
    config.write_text(config.read_text().replace("BertForSequenceClassification", "Gone"))
    with pytest.raises(ValueError, match=r"'Gone'.*Say the task: text-classification"):
        load_model(path)


# --- tokenizers and lengths that do not fit --------------------------------------------------------------------------


def test_a_tokenizer_without_a_mask_fills_none(tmp_path):
    tokenizer = texts.tokenizer()
    tokenizer.mask_token = None
    path = texts.labelled(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="its tokenizer has no mask token"):
        parts(tiny.tiny_model("bert", "BertForMaskedLM"), path, tokenizer)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "roberta", "gpt2", "opt", "bart", "llama", "t5"])
def test_a_model_runs_at_all_of_its_positions_and_a_longer_text_is_refused(tmp_path, family):
    model = tiny.tiny_model(family)
    limit = positions(model)
    if family == "t5":  # its positions are relative
        assert limit is None
        return
    assert limit == (63 if family == "roberta" else 64)
    with torch.no_grad():
        model(**tiny.tiny_batch(model, length=limit))
    with pytest.raises(ValueError, match=f"sequence_length={limit + 1}: this {family} has {limit} positions"):
        parts(model, texts.labelled(tmp_path / "a.jsonl"), length=limit + 1)


def test_one_word_in_two_may_be_known(tmp_path, classifier):
    """Text of which the tokenizer knows the most is used; of which it knows at most half, refused."""
    for count, words in enumerate(("w1 w2 other", "w1 other"), 1):
        rows = [{"text": f"{words} {words}", "label": i % 2} for i in range(40)]
        path = texts.write_jsonl(tmp_path / f"{count}.jsonl", rows)
        if count == 1:
            assert parts(classifier, path).calibration
        else:
            with pytest.raises(ValueError, match=r"50% of the tokens of .* are \[UNK\]"):
                parts(classifier, path)


def test_an_unlabelled_row_of_a_datasets_own_numbering_is_no_label(tmp_path):
    """-1 stands for none there; it must not become the last name."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(text=Value("string"), label=ClassLabel(names=["LABEL_0", "LABEL_1"]))
    data = Dataset.from_dict({"text": texts.sentences(40), "label": [0] * 39 + [-1]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="does not know: -1"):
        parts(tiny.tiny_model("bert"), tmp_path / "a.parquet")


@pytest.mark.parametrize("talk", [[{"content": "w1"}], [{"role": "user"}], ["w1"], [3]])
def test_messages_that_the_template_cannot_read(tmp_path, talk):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"messages": talk} for _ in range(60)])
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="'messages' cannot be read as messages of a role and a content"):
        parts(tiny.tiny_model("llama"), path, texts.tokenizer(template), length=7)
