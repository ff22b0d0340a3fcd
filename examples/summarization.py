"""A sequence-to-sequence model (T5, BART) made smaller and distilled, on pairs of texts.

    python examples/summarization.py --model_name my-finetuned-t5 --train_file train.jsonl \\
        --validation_file dev.jsonl --output_dir small --keep 0.7 --predict_with_generate
    hf-prune train recipes/summarization.yaml
"""

from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainingArguments,
)

from hf_prune import DistillationConfig, PruningConfig, PruningSeq2SeqTrainer


@dataclass
class Options:
    model_name: str
    train_file: str
    validation_file: str
    text_column: str = "text"
    summary_column: str = "summary"
    prefix: str = ""
    max_length: int = 512
    max_summary: int = 64
    distill: bool = True


def main(line=None):
    parser = HfArgumentParser((Options, Seq2SeqTrainingArguments, PruningConfig, DistillationConfig))
    options, training, pruning, distillation = parser.parse_args_into_dataclasses(line)

    training.generation_max_length = training.generation_max_length or options.max_summary

    data = load_dataset("json", data_files={"train": options.train_file, "validation": options.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(options.model_name)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model_name)

    def encode(rows):
        texts = [options.prefix + text for text in rows[options.text_column]]
        inputs = tokenizer(texts, truncation=True, max_length=options.max_length, return_token_type_ids=False)
        targets = tokenizer(text_target=rows[options.summary_column], truncation=True, max_length=options.max_summary)
        return {**inputs, "labels": targets["input_ids"]}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    def overlap(predicted):
        """Mean F1 of the words of a generated summary and the given one (ROUGE-1 without stemming)."""
        scores = []
        for made, wanted in zip(predicted.predictions, predicted.label_ids, strict=True):
            a, b = (
                tokenizer.decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True).split()
                for ids in (made, wanted)
            )
            common = sum(min(a.count(word), b.count(word)) for word in set(a))
            scores.append(2 * common / max(len(a) + len(b), 1))
        return {"rouge1": float(np.mean(scores))}

    trainer = PruningSeq2SeqTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=overlap if training.predict_with_generate else None,
        pruning=pruning,  # <- what pruning adds
        distillation=distillation if options.distill else None,  # <- and learning from the dense model
    )
    before = trainer.evaluate(metric_key_prefix="dense")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    metrics = {**before, **trainer.evaluate()}
    trainer.save_model()
    trainer.save_metrics("all", metrics)
    return metrics


if __name__ == "__main__":
    main()
