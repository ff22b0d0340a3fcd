"""An image classifier (folders of images, one a class) made smaller and distilled.

    python examples/image_classification.py --model_name my-finetuned-vit --image_folder pictures \\
        --output_dir small --keep 0.5 --remove_unused_columns false
    hf-prune train recipes/image_classification.yaml
"""

from dataclasses import dataclass

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, TrainingArguments

from hf_prune import DistillationConfig, PruningConfig, PruningTrainer


@dataclass
class Options:
    model_name: str
    image_folder: str  # with train/ and validation/, a folder a class in each
    distill: bool = True


def main(line=None):
    parser = HfArgumentParser((Options, TrainingArguments, PruningConfig, DistillationConfig))
    options, training, pruning, distillation = parser.parse_args_into_dataclasses(line)

    data = load_dataset("imagefolder", data_dir=options.image_folder)
    labels = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model_name)
    model = AutoModelForImageClassification.from_pretrained(options.model_name, num_labels=len(labels))

    def collate(rows):
        images = [row["image"].convert("RGB") for row in rows]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    def accuracy(predicted):
        return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids).mean().item()}

    training.remove_unused_columns = False  # the collator reads the image column
    trainer = PruningTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=processor,
        data_collator=collate,
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
