"""The README's example runs as written, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[EOS]", "good", "bad", "film", "plot", "the"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


@pytest.mark.filterwarnings("ignore:.*calibration tokens:UserWarning")  # a tiny example has few
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # TrainingArguments' default, without a GPU
def test_the_example_runs_as_written(tmp_path, monkeypatch, tokenizer, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("bert", intermediate_size=1024).save_pretrained("my-finetuned-bert")
    tokenizer.save_pretrained("my-finetuned-bert")
    texts = ["good film", "bad plot", "the good plot", "the bad film"] * 60
    rows = {"label": [1, 0] * 120, **tokenizer(texts, return_token_type_ids=False)}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(examples) == 2
    names = {"train_dataset": Dataset.from_dict(rows)}
    for example in examples:
        exec(example, names)
    assert "ffn" in capsys.readouterr().out
    assert Path("small/config.json").exists()
