"""Open models, tokenizers and processors by name, as the command line needs them."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plan import short

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASKS = {  # pipeline task -> the Auto class that opens a model for it
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}
WITHOUT_PIPELINE = ("question-answering", "text2text-generation")  # transformers 5 dropped these pipelines
MESSAGE = 400  # characters shown of another library's message


def load_model(name: str, task: str | None = None, **options: Any) -> PreTrainedModel:
    """Open a directory or Hub id with the class that its config names, or with the Auto class of a `task`.

    Raises:
        ValueError: the config names no class, or one that transformers does not have.
        FileNotFoundError: `name` is a path and not a Hub id, and no directory with a config.json is there.
    """
    import transformers

    name, config = load_config(name, options.get("revision"))
    opener = model_class(config, name) if task is None else getattr(transformers, TASKS[task])
    with read_as(name, f"a {config.model_type} model{f' for {task}' if task else ''}"):
        return opener.from_pretrained(name, **options).eval()


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, Any]:
    """The config of a directory or Hub id, and the full path or id.

    Raises:
        FileNotFoundError: `name` is a path and not a Hub id, and no directory with a config.json is there.
    """
    import transformers

    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists():  # no Hub id
        name = os.path.expanduser(name)
        if not Path(name, "config.json").is_file():
            raise FileNotFoundError(f"{name!r}: no directory with a config.json. Give one, or a Hub id (owner/name).")
    with read_as(name, "a model"):
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        return name, transformers.AutoConfig.from_pretrained(name, **options)


def remote_class(config: Any, name: str, revision: str | None = None) -> Any:
    """The class that a model's own code gives; None: it brings none.

    Raises:
        OSError, ValueError: the code cannot be read.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = {key: path for key, path in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in key}
    if not named:
        return None
    key = next((key for key in named if "For" in key), next(iter(named)))
    with read_as(name, "a model with code of its own"):
        return get_class_from_dynamic_module(named[key], name, revision=revision)


def model_class(config: Any, name: str = "") -> Any:
    """The class that a config names.

    Raises:
        ValueError: it names none, one that transformers does not have, or one of another family.
    """
    import transformers

    named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    stock = named.removeprefix("Pruned") if isinstance(named, str) else ""  # saved after it was opened with remote code
    found = getattr(transformers, stock, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f"{name}: config.json names the class {short(named)}, which is no model of transformers. "
            f"Say the task: {', '.join(TASKS)}."
        )
    if found.config_class is not None and not isinstance(config, found.config_class):
        raise ValueError(
            f"{name}: config.json is of a {config.model_type}, and names the class {named}, which is none."
        )
    return found


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a directory or Hub id.

    Raises:
        FileNotFoundError: there is none (transformers would make one that knows no word).
        ValueError, OSError: it cannot be read.
    """
    from transformers import AutoTokenizer

    with read_as(name, "a tokenizer, which the text needs (name another with --tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name), revision=revision)
    words = set(tokenizer.get_vocab().values()) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if len(words) < 2:
        raise FileNotFoundError(
            f"{name!r} has no tokenizer (such as tokenizer.json), so that no word would be known. Save there the one "
            "that the model was trained with, or name it with --tokenizer."
        )
    return tokenizer


def load_processor(model: PreTrainedModel, name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model that reads text, or the image processor of one that reads images."""
    if model.main_input_name == "input_ids":
        return load_tokenizer(name, revision)
    from transformers import AutoProcessor

    with read_as(name, "a processor of images"):
        return AutoProcessor.from_pretrained(os.path.expanduser(name), revision=revision)


@contextlib.contextmanager
def read_as(name: str, what: str) -> Iterator[None]:
    """Turn every error of another library that opens `name` into one sentence that says as `what` it cannot be read.

    Raises:
        OSError: the library raised one. ValueError: it raised anything else.
    """
    try:
        yield
    except Exception as error:  # of any kind: a damaged file can fail anywhere in that library
        plain = isinstance(error, ValueError | OSError)
        text = textwrap.shorten(f"{'' if plain else type(error).__name__ + ': '}{error}", MESSAGE, placeholder=" ...")
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name!r} cannot be read as {what}: {text}") from error
