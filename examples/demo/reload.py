"""Open a saved classifier in a process of its own and score it: `python reload.py DIRECTORY ROWS.json plain|hf_prune`.

A script, not part of the package: with "plain" it makes sure that hf_prune cannot be imported. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def accuracy(directory: str, rows: list[dict[str, Any]], max_length: int) -> float:
    """Share of right answers of the model in `directory`, opened as any user would."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = sorted(rows, key=lambda row: len(row["text"]))
    right = 0
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        texts = [row["text"] for row in batch]
        inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            answers = model(**inputs.to(model.device)).logits.argmax(-1).tolist()
        right += sum(answer == row["label"] for answer, row in zip(answers, batch, strict=True))
    return right / len(rows)


def main(directory: str, data: str, door: str) -> None:
    if door == "plain":
        sys.modules["hf_prune"] = None  # type: ignore[assignment]  # `import hf_prune` now raises ImportError
    else:
        import hf_prune  # noqa: F401
    given = json.loads(Path(data).read_text())
    found = accuracy(directory, given["rows"], given["max_length"])
    sys.stdout.write(json.dumps({"accuracy": found, "rows": len(given["rows"]), "opened_with": door}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
