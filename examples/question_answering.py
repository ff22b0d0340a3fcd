"""Extractive question answering (SQuAD's columns: question, context, answers), pruned and distilled.

    python examples/question_answering.py --model_name my-squad-bert --train_file train.json \\
        --validation_file dev.json --output_dir small --keep 0.5 --shapes uniform
    hf-prune train recipes/question_answering.yaml
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers import default_data_collator as collate

from hf_prune import DistillationConfig, PruningConfig, PruningTrainer


@dataclass
class Options:
    model_name: str
    train_file: str
    validation_file: str
    max_length: int = 384
    stride: int = 128
    distill: bool = True


def main(line=None):
    parser = HfArgumentParser((Options, TrainingArguments, PruningConfig, DistillationConfig))
    options, training, pruning, distillation = parser.parse_args_into_dataclasses(line)

    data = load_dataset("json", data_files={"train": options.train_file, "validation": options.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(options.model_name)
    model = AutoModelForQuestionAnswering.from_pretrained(options.model_name)

    def windows(rows):
        """Overlapping windows over each context; an answer outside a window is at its first token."""
        encoded = tokenizer(
            rows["question"], rows["context"], truncation="only_second", max_length=options.max_length,
            stride=options.stride, return_overflowing_tokens=True, return_offsets_mapping=True, padding="max_length",
        )  # fmt: skip
        starts, ends = [], []
        for i, (example, offsets) in enumerate(
            zip(encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping"), strict=True)
        ):
            answer = rows["answers"][example]
            first = answer["answer_start"][0]
            last = first + len(answer["text"][0])
            inside = [
                j for j, (a, b) in enumerate(offsets) if encoded.sequence_ids(i)[j] == 1 and first < b and a < last
            ]
            whole = inside and offsets[inside[0]][0] <= first and offsets[inside[-1]][1] >= last
            starts.append(inside[0] if whole else 0)
            ends.append(inside[-1] if whole else 0)
        return {**encoded, "start_positions": starts, "end_positions": ends}

    data = data.map(windows, batched=True, remove_columns=data["train"].column_names)

    def exact(predicted):
        """Share of windows whose span is found exactly."""
        found = [logits.argmax(-1) == at for logits, at in zip(predicted.predictions, predicted.label_ids, strict=True)]
        return {"exact_span": (found[0] & found[1]).mean().item()}

    trainer = PruningTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=collate,
        compute_metrics=exact,
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
