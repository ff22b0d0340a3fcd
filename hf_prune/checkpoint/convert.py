"""A model in the class of another stock family, and the names that transformers has for a class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..model import sites
from ..model.families import family_for
from ..model.offload import check_in_memory
from .layout import KEY, write_


def as_model_type(model: PreTrainedModel, model_type: str) -> PreTrainedModel:
    """The same weights (shared, not copied) in the class of another stock family.

    Raises:
        ValueError: not the other family of this one, layers of different sizes, biases that the other lacks, or
            offloaded weights.
    """
    from transformers import AutoConfig

    family = family_for(model.config.model_type)
    if model_type == model.config.model_type:
        return model
    if family.as_model_type != model_type:
        raise ValueError(
            f"A {family.model_type} model cannot be saved as {model_type!r}; allowed: {family.as_model_type!r}."
        )
    check_in_memory(model, f"model_type={model_type!r} puts the weights into another class")
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
    values.pop("per_layer_config", None)
    for site in sites.find_sites(model, family):
        for key, value in site.values.items():
            if values.setdefault(f"_{key}", value) != value:
                raise ValueError(f"model_type={model_type!r} needs the same sizes in every layer; {key} differs.")
            values[key] = value
    config = AutoConfig.for_model(model_type)
    known = set(config.to_dict()) - {"transformers_version"}
    config = AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if key in known})
    config.sliding_window = None
    cls = _class_of(model_type, type(model))
    with torch.device("meta"):
        twin = cls(config)
    missing = twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    if missing.unexpected_keys or missing.missing_keys:
        raise ValueError(f"{cls.__name__} cannot hold {missing.unexpected_keys or missing.missing_keys} of this model.")
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, buffer)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    summary = {k: v for k, v in model.config.__dict__.get(KEY, {}).items() if k not in ("format", "shapes", "layers")}
    write_(twin, family_for(model_type), summary)
    return twin


def auto_classes(cls: type[PreTrainedModel], model_type: str | None = None) -> list[str]:
    """Names of the Auto classes that open a model class, the most specific first."""
    from transformers.models.auto import modeling_auto

    model_type = model_type or cls.config_class.model_type  # type: ignore[union-attr]
    found = []
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        names = mapping._model_mapping.get(model_type, ()) if name.startswith("AutoModel") and mapping else ()
        if cls.__name__ in (names if isinstance(names, tuple) else (names,)):
            found.append(name)
    specific = [name for name in found if "For" in name and "PreTraining" not in name]
    return specific or found or ["AutoModel"]


def _class_of(model_type: str, like: type[PreTrainedModel]) -> Any:
    """The class of another family for the same task."""
    import transformers
    from transformers.models.auto import modeling_auto

    auto = getattr(modeling_auto, auto_classes(like)[0])
    name = auto._model_mapping._model_mapping[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])
