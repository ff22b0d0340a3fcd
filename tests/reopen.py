"""Run in a process of its own: open saved models and say how far their outputs are from those kept beside them.

    python reopen.py JOBS.json  ->  one JSON line {name: largest difference, or the error}

A job: {"name", "directory", "opener" (a name in transformers), "options", "inputs" (.pt with inputs and outputs)}.
The environment variable HF_PRUNE says "blocked" (importing it raises) or "imported".
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_prune":
            raise ImportError("hf_prune is blocked in this process")


def attempt(job):
    import torch
    import transformers

    kept = torch.load(job["inputs"])
    try:
        opener = getattr(transformers, job["opener"])
        model = opener.from_pretrained(job["directory"], **job.get("options", {})).eval()
        with torch.no_grad():
            got = [x for x in model(**kept["inputs"]).to_tuple() if isinstance(x, torch.Tensor)]
        return max((a - b).abs().max().item() for a, b in zip(got, kept["outputs"], strict=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    if os.environ["HF_PRUNE"] == "blocked":
        sys.meta_path.insert(0, Blocker())
    else:
        import hf_prune  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = {job["name"]: attempt(job) for job in json.loads(Path(sys.argv[1]).read_text())}
    assert ("hf_prune" in sys.modules) == (os.environ["HF_PRUNE"] == "imported")
    print(json.dumps(found))
