"""Make a language model smaller and train it back on text, with adapters if asked.

    python examples/causal_lm.py --model_name Qwen/Qwen3-0.6B --train_file text.txt --validation_file other.txt \\
        --output_dir small --keep 0.8 --metric params --max_steps 500
    hf-prune train recipes/causal_lm.yaml --set lora_rank=16
"""

import math
from dataclasses import dataclass
from itertools import chain

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments, default_data_collator

from hf_prune import DistillationConfig, PruningConfig, PruningTrainer


@dataclass
class Options:
    model_name: str
    train_file: str
    validation_file: str
    block_size: int = 256
    lora_rank: int = 0  # 0: train all weights
    distill: bool = True


def main(line=None):
    parser = HfArgumentParser((Options, TrainingArguments, PruningConfig, DistillationConfig))
    options, training, pruning, distillation = parser.parse_args_into_dataclasses(line)

    data = load_dataset("text", data_files={"train": options.train_file, "validation": options.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(options.model_name)
    model = AutoModelForCausalLM.from_pretrained(options.model_name)

    def blocks(rows):
        tokens = list(chain.from_iterable(tokenizer([f"{text}\n" for text in rows["text"]])["input_ids"]))
        size = options.block_size
        ids = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": ids, "labels": ids}

    data = data.map(blocks, batched=True, remove_columns=["text"])

    trainer = PruningTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        pruning=pruning,  # <- what pruning adds
        distillation=distillation if options.distill else None,  # <- learn from the dense model
        peft_config=LoraConfig(r=options.lora_rank, task_type="CAUSAL_LM", target_modules="all-linear")
        if options.lora_rank
        else None,  # <- or train adapters on what is left; they are merged at the end
    )
    before = trainer.evaluate(metric_key_prefix="dense")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    metrics = {**before, **trainer.evaluate()}
    metrics |= {f"{name}_perplexity": math.exp(metrics[f"{name}_loss"]) for name in ("dense", "eval")}
    trainer.save_model()
    trainer.save_metrics("all", metrics)
    return metrics


if __name__ == "__main__":
    main()
