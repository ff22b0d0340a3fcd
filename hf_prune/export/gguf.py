"""A language model as a GGUF file for llama.cpp. A family is a row of `ARCHITECTURES`.

Names, sizes and tokenizers follow the `gguf` package. Layers of different sizes go through llama.cpp's `deci`, a Llama
whose head counts and FFN widths are lists; the other architectures read the first layer's sizes for all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model.anatomy import describe
from ..model.sites import Site
from . import unigram

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTALL = "pip install 'hf-prune[gguf]'"
TYPES = {"f32": "F32", "f16": "F16"}  # our names -> gguf's


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp sees a family."""

    name: str  # gguf's, in capitals
    interleaved: bool = False  # its rotary embedding pairs neighbours: rows of Q and K are put in that order
    unit_offset: bool = False  # its norms multiply by the weight, transformers' by 1 + weight
    by_layer: str = ""  # the architecture for layers of different sizes


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LLAMA", interleaved=True, by_layer="DECI"),
    "mistral": Architecture("LLAMA", interleaved=True, by_layer="DECI"),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma2": Architecture("GEMMA2", unit_offset=True),
    "gemma3_text": Architecture("GEMMA3", unit_offset=True),
}
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
OLD, DIGITS = "the regex of GPT-2", "each digit by itself, then the regex of GPT-2"
PRE_TOKENIZERS: Mapping[str, str] = {  # how a byte-level tokenizer splits text -> llama.cpp's name for it
    f"{LETTERS}\\p{{N}}{{1,3}}{REST}": "llama-bpe",
    f"{LETTERS}\\p{{N}}{REST}": "qwen2",
    OLD: "gpt-2",
    DIGITS: "smollm",
}


def to_gguf(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    processing_class: Any,
    *,
    dtype: str = "f16",
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one GGUF file, whole or not at all.

    Args:
        processing_class: the tokenizer; it is written into the file.
        dtype: "f16" or "f32" of the matrices; norms stay in fp32.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text; default: read off the tokenizer.

    Raises:
        ValueError: a family or a tokenizer that llama.cpp does not have, or layers of different sizes in a family for
            which it has no such architecture. FileExistsError: the file is there. IsADirectoryError,
            NotADirectoryError: the path is a directory, or lies in a file. ImportError: no gguf package.
    """
    path = _target(path, overwrite)
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF needs the gguf package: {INSTALL}") from error
    if dtype not in TYPES:
        raise ValueError(
            f"dtype={dtype!r}: llama.cpp's own tools make other types of a file; here: {', '.join(TYPES)}."
        )
    row, name = _architecture(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[name]])
    try:
        _sizes(writer, model)
        _tokenizer(writer, processing_class, pre_tokenizer, model.config.get_text_config().vocab_size)
        _tensors(writer, model, row, gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], _depth(model)), dtype)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, and GGUF is one file: name it, such as {path / 'model.gguf'}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another name, or overwrite it (overwrite=True, --overwrite).")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is a file: {path} cannot be made in it.")
    return path


def _architecture(model: PreTrainedModel) -> tuple[Architecture, str]:
    model_type = str(model.config.model_type)
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise ValueError(f"llama.cpp: no row for {model_type!r}; known: {', '.join(ARCHITECTURES)}.")
    if all(len(set(sizes)) == 1 for sizes in _by_layer(model).values()):
        return row, row.name
    if not row.by_layer:
        raise ValueError(
            f"llama.cpp builds every layer of a {model_type} alike, and these differ. Prune with shapes='uniform', or "
            "export to ONNX."
        )
    return row, row.by_layer


def _depth(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _by_layer(model: PreTrainedModel) -> dict[str, list[int]]:
    """Query heads, KV heads and FFN width of every layer."""
    sites: list[Site] = sorted(describe(model).sites, key=lambda site: site.layer)
    attention = [site for site in sites if site.kind == "attention"]
    return {
        "head_count": [site.sizes["heads"] for site in attention],
        "head_count_kv": [site.sizes["kv_groups"] for site in attention],
        "feed_forward_length": [site.columns for site in sites if site.kind == "ffn"],
    }


def _sizes(writer: Any, model: PreTrainedModel) -> None:
    config: Any = model.config.get_text_config()
    head_dim = next(site.widths["heads"] for site in describe(model).sites if site.kind == "attention")
    writer.add_name(Path(config._name_or_path).name or "pruned")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    for key, sizes in _by_layer(model).items():
        getattr(writer, f"add_{key}")(sizes[0] if len(set(sizes)) == 1 else sizes)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)  # Gemma 3 has one for each kind of layer
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"llama.cpp: rotary embeddings of type {rope['rope_type']!r} are not written yet; only plain ones."
        )
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            getattr(writer, f"add_{key}")(getattr(config, key))


# --- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(writer: Any, model: PreTrainedModel, row: Architecture, names: Any, dtype: str) -> None:
    heads = _by_layer(model)
    tied = model.config.get_text_config().tie_word_embeddings
    for name, value in model.state_dict().items():
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"llama.cpp has no tensor for {name} {tuple(value.shape)} of this family.")
        value = value.detach().to("cpu", torch.float32)
        if row.interleaved and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            kind = "head_count" if "q_proj" in name else "head_count_kv"
            value = interleave(value, heads[kind][int(name.split("layers.")[1].split(".")[0])])
        if row.unit_offset and name.endswith("norm.weight"):
            value = value + 1
        wide = value.ndim > 1 and dtype == "f16"
        writer.add_tensor(target, value.to(torch.float16 if wide else torch.float32).numpy())


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (x1..xn, y1..yn) to pairs (x1, y1, ..). weight: [N·H, ...] -> the same shape."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _tokenizer(writer: Any, tokenizer: Any, pre_tokenizer: str | None, size: int) -> None:
    import gguf

    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        home = Path(directory)
        parts = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))
        model = parts["model"]
        kind = model["type"] + (" of bytes" if model["type"] == "BPE" and not model.get("byte_fallback") else "")
        if kind not in TOKENIZERS:
            raise ValueError(f"llama.cpp: a {model['type']} tokenizer is not written; {', '.join(TOKENIZERS)} are.")
        tokens, scores, types = TOKENIZERS[kind](writer, home, parts, pre_tokenizer)
        missing = range(len(tokens), size)
        writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in missing)])
        writer.add_token_scores([*scores, *(-1e6 for _ in missing)])
        writer.add_token_types([*types, *(gguf.TokenType.UNUSED for _ in missing)])
        special = gguf.SpecialVocab(home, load_merges=True, n_vocab=size)
        if kind == "Unigram":  # llama.cpp would add an end token to each text
            special.add_special_token = _ends(tokenizer)
        special.add_to_gguf(writer)


Vocabulary = tuple[list[Any], list[float], list[Any]]  # tokens, their scores, their types


def _bytes(writer: Any, home: Path, parts: Mapping[str, Any], pre_tokenizer: str | None) -> Vocabulary:
    import gguf

    vocabulary: Any = gguf.BpeVocab(home)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or _splits(parts["pre_tokenizer"]))
    return _columns(vocabulary.all_tokens())


def _sentencepiece(writer: Any, home: Path, parts: Mapping[str, Any], _: str | None) -> Vocabulary:
    import gguf

    vocabulary: Any = gguf.LlamaHfVocab(home)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_starts_with_space(parts))
    tokens, _scored, types = _columns(vocabulary.all_tokens())
    return tokens, _scores(tokens, parts["model"]["merges"]), types


def _unigram(writer: Any, home: Path, parts: Mapping[str, Any], _: str | None) -> Vocabulary:
    import gguf

    unigram.check(parts)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_starts_with_space(parts))
    writer.add_remove_extra_whitespaces(unigram.joins_spaces(parts))
    table = unigram.charsmap(parts)
    if table:
        writer.add_precompiled_charsmap(table)
    return _columns((text, score, gguf.TokenType[kind]) for text, score, kind in unigram.pieces(parts))


TOKENIZERS: Mapping[str, Callable[[Any, Path, Mapping[str, Any], str | None], Vocabulary]] = {
    "BPE of bytes": _bytes,
    "BPE": _sentencepiece,
    "Unigram": _unigram,
}


def _columns(rows: Iterable[tuple[Any, float, Any]]) -> Vocabulary:
    tokens, scores, types = (list(part) for part in zip(*rows, strict=True))
    return tokens, scores, types


def _ends(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer puts a first and a last token around a text."""
    added = tokenizer("")["input_ids"]
    ends = {"bos": added[:1], "eos": added[-1:]}
    return {name: found == [getattr(tokenizer, f"{name}_token_id")] for name, found in ends.items()}


def _splits(held: Any) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text before it merges."""
    parts = held.get("pretokenizers", [held])
    way = next((str(part["pattern"].get("Regex")) for part in parts if part["type"] == "Split"), "")
    if parts[-1]["type"] == "ByteLevel" and parts[-1]["use_regex"] and not way:
        kinds = [part["type"] for part in parts[:-1]]
        way = OLD if not kinds else DIGITS if kinds == ["Digits"] and parts[0]["individual_digits"] else ""
    name = PRE_TOKENIZERS.get(way)
    if name is None:
        raise ValueError(
            f"llama.cpp has a name for each way to split text, and this tokenizer's is not known here: "
            f"{json.dumps(held)[:200]}. Give pre_tokenizer=."
        )
    return name


def _scores(tokens: Sequence[bytes], merges: Sequence[Any]) -> list[float]:
    """llama.cpp's SentencePiece joins the pair that scores highest: the earlier a merge, the higher."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
    ranks: dict[bytes, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair).encode(), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _starts_with_space(parts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before the text."""
    normalizer, pre = parts.get("normalizer") or {}, parts.get("pre_tokenizer") or {}
    steps = [step["type"] for step in normalizer.get("normalizers", [normalizer]) if step]
    marks = [part for part in pre.get("pretokenizers", [pre]) if part.get("type") == "Metaspace"]
    return "Prepend" in steps or any(part.get("prepend_scheme", "always") != "never" for part in marks)
