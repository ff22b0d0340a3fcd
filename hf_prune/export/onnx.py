"""A model as an ONNX graph for ONNX Runtime, in any shapes, in its own precision or with INT8 weights.

transformers' own exporter does the work: one graph for a classifier or an encoder; for a model that generates, one for
the prompt and one for each token after it, with the cache, and before them the encoder where there is one. They read
one copy of the weights. Only graphs whose outputs ONNX Runtime reproduces get the final name.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import find_labels

from ..checkpoint.directory import beside, refuse_full
from ..checkpoint.proof import proof_inputs
from ..model.probe import cache_argument
from ..model.weights import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # of the largest output; INT8 is reported, not judged
INSTALL = "pip install 'hf-prune[onnx]'"


def to_onnx(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    *,
    int8: bool = False,
    processing_class: Any = None,
    overwrite: bool = False,
) -> float:
    """Write `model.onnx`, or the graphs of a model that generates (encoder, prefill, decode), and compare them.

    Args:
        batches: inputs to compare on; default: rows kept by prune(), else random tokens.
        int8: weights and embeddings in INT8, activations quantised as they come (dynamic).
        processing_class: tokenizer or processor, saved alongside.
        overwrite: replace a directory that is not empty.

    Returns:
        The largest difference between ONNX Runtime's and torch's output, relative to the largest output.

    Raises:
        ValueError: no input is known to compare on. FileExistsError: the directory is not empty. ImportError: a package
            is missing. RuntimeError: ONNX Runtime gives other outputs; nothing is left under the final name.
    """
    target = refuse_full(directory, overwrite)
    exporter, config = _exporter(int8)
    inputs = graph_inputs(model, _examples(model, batches))
    with quiet(model), torch.no_grad(), _silent():
        exported = _exported(model, exporter, config, inputs)
        with beside(target) as temporary:
            exported.save_pretrained(temporary)
            if len(exported.components) > 1:
                _share(temporary)
            if processing_class is not None:
                processing_class.save_pretrained(temporary)
            difference = _difference(model, temporary, inputs)
            if not int8 and not difference <= TOLERANCE:
                raise RuntimeError(
                    f"ONNX Runtime's outputs differ from torch's by {difference:.2e} of the largest (allowed "
                    f"{TOLERANCE:.0e}). Nothing was saved."
                )
    return difference


def _examples(model: Any, batches: Sequence[Mapping[str, torch.Tensor]] | None) -> dict[str, torch.Tensor]:
    given = proof_inputs(model, batches)
    if model.main_input_name not in given:
        raise ValueError(
            f"ONNX: a {type(model).__name__} reads {model.main_input_name}, of which no example is at hand to trace it "
            "and compare it on. Give to_onnx(batches=[...]), or call it right after prune(), which keeps some rows."
        )
    return given


def _exported(model: Any, exporter: Any, config: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """The graphs of a model by their names, as transformers holds and saves them."""
    if not model.can_generate():
        with _eager_attention(model):
            return exporter.export(model, inputs, config)
    if not model.config.is_encoder_decoder:
        return exporter.export_for_generation(model, inputs, config)
    encoder, prompt = model.get_encoder(), {name: inputs[name] for name in inputs if not name.startswith("decoder_")}
    with _eager_attention(encoder):
        first = exporter.export(encoder, prompt, config).components["model"]
    inputs = {**prompt, "decoder_input_ids": inputs["decoder_input_ids"][:, :3]}  # of one token, one is all they take
    exported = exporter.export_for_generation(model, inputs, config)
    exported.components = {"encoder": first, **exported.components}
    return exported


def _share(directory: Path) -> None:
    from .shared import share_weights

    share_weights(directory)


def graph_inputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs without labels, and with the token_type_ids that the tokenizer gives where the model reads them."""
    labels = find_labels(type(model))
    given = {name: tensor for name, tensor in inputs.items() if name not in labels}
    if getattr(model.config, "type_vocab_size", 0) > 1 and "token_type_ids" not in given:
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    if model.config.is_encoder_decoder and model.can_generate() and "decoder_input_ids" not in given:
        given["decoder_input_ids"] = _decoder_input_ids(model, inputs)
    return given


def _decoder_input_ids(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the decoder reads for the labels, as in training; without labels its first token, three times."""
    if "labels" in inputs and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    first = inputs[model.main_input_name]
    start = model.generation_config.decoder_start_token_id or model.config.decoder_start_token_id or 0
    return torch.full((len(first), 3), start, dtype=torch.long, device=first.device)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence the exporter, whose notes on its own steps mean nothing to users. Errors are still raised."""
    disabled = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention of an encoder as products and a softmax, which become one operator.

    With sdpa the graph would also hold operators that clear rows without keys.
    """
    before = model.config._attn_implementation
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _exporter(int8: bool) -> tuple[Any, Any]:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType
        from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs onnx, onnxscript, onnxruntime, torch >= 2.13 and transformers >= 5.23: {INSTALL}"
        ) from error
    from .kernels import CpuKernels

    dynamic = OnnxRuntimeDynamicConfig(per_channel=True, weight_type=QuantType.QInt8)
    quantizer = CpuKernels(OnnxRuntimeQuantizer(dynamic) if int8 else None)
    return OnnxExporter(), OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer)


def _difference(model: Any, directory: Path, inputs: Mapping[str, Any]) -> float:
    """The largest relative difference of the outputs; where the model generates, also of the token after the prompt."""
    from transformers.exporters import ExportedModel

    exported: Any = ExportedModel.from_pretrained(directory)
    if not model.can_generate():
        return _apart(model(**inputs).to_tuple()[0], exported(**inputs).to_tuple()[0])
    find = _after_encoder if model.config.is_encoder_decoder else _after_prompt
    return max(_apart(ours, theirs) for ours, theirs in find(model, exported.runners, inputs))


def _after_prompt(model: Any, runners: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """torch's logits and ONNX Runtime's, for a prompt and then for one more token."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    prompt = {"input_ids": ids, "attention_mask": mask}
    ours, theirs = model(**prompt, use_cache=True), _step(runners["prefill"], prompt, {})
    yield ours.logits, theirs.logits
    token = {"input_ids": ids[:, -1:], "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], -1)}
    name = cache_argument(model)
    after, cached = model(**token, **{name: getattr(ours, name)}), {name: getattr(theirs, name)}
    yield after.logits, _step(runners["decode"], token, cached).logits


def _after_encoder(model: Any, runners: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same for an encoder-decoder, and before it what the encoder gives."""
    read = {name: inputs[name] for name in inputs if not name.startswith("decoder_")}
    ids, name = inputs["decoder_input_ids"], cache_argument(model)
    given = {**{key: read[key] for key in ("attention_mask",) if key in read}, "decoder_input_ids": ids}
    ours, encoded = model(**read, decoder_input_ids=ids, use_cache=True), _known(runners["encoder"], read)
    yield ours.encoder_last_hidden_state, encoded.last_hidden_state
    theirs = _known(runners["prefill"], {**given, "encoder_outputs": encoded})
    yield ours.logits, theirs.logits
    given["decoder_input_ids"] = ids[:, -1:]
    hidden = (ours.encoder_last_hidden_state,)
    after = model(**given, encoder_outputs=hidden, **{name: getattr(ours, name)})
    again = _known(runners["decode"], {**given, "encoder_outputs": encoded, name: getattr(theirs, name)})
    yield after.logits, again.logits


def _known(runner: Any, inputs: Mapping[str, Any]) -> Any:
    """Run one graph on those of the inputs that it takes."""
    return runner(**{name: value for name, value in inputs.items() if name in runner.metadata.kwargs})


def _step(runner: Any, inputs: Mapping[str, torch.Tensor], cached: Mapping[str, Any]) -> Any:
    """Run one graph of a language model, with position ids where the graph takes them."""
    if "position_ids" in runner.metadata.kwargs:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        inputs = {**inputs, "position_ids": positions[:, -inputs["input_ids"].shape[1] :]}
    return runner(**inputs, **cached)


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value (or to 1 where that is less). Both of the same shape."""
    a, b = ours.float().cpu(), theirs.float().cpu()
    return ((a - b).abs().max() / a.abs().max().clamp_min(1.0)).item()
