"""Fine-tune a text classifier to a fraction of its cost, learning from its dense self.

    python examples/classification.py --model_name my-finetuned-bert --train_file train.csv --validation_file dev.csv \\
        --output_dir small --keep 0.5 --shapes uniform --num_train_epochs 1
    hf-prune train recipes/classification.yaml --set keep=0.3
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
)

from hf_prune import DistillationConfig, PruningConfig, PruningTrainer


@dataclass
class Options:
    model_name: str
    train_file: str
    validation_file: str
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = 64
    distill: bool = True


def main(line=None):
    parser = HfArgumentParser((Options, TrainingArguments, PruningConfig, DistillationConfig))
    options, training, pruning, distillation = parser.parse_args_into_dataclasses(line)

    kind = options.train_file.rsplit(".", 1)[-1].replace("jsonl", "json")
    data = load_dataset(kind, data_files={"train": options.train_file, "validation": options.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(options.model_name)
    labels = sorted(set(data["train"][options.label_column]))
    model = AutoModelForSequenceClassification.from_pretrained(options.model_name, num_labels=len(labels))

    def encode(rows):
        tokens = tokenizer(rows[options.text_column], truncation=True, max_length=options.max_length)
        return {**tokens, "labels": [labels.index(label) for label in rows[options.label_column]]}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    def accuracy(predicted):
        return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids).mean().item()}

    trainer = PruningTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
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
