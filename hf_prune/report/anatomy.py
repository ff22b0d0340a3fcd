"""The rows that `hf-prune inspect` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint.layout import KEY
from ..config import PruningConfig
from ..decide.allocate import SHAPES, reachable
from ..decide.costs import CostModel, cost_model
from ..decide.units import choose_units, default_align
from ..model.anatomy import Anatomy
from ..model.sites import Site
from ..model.wide import HIDDEN
from .table import Row, count

STOCK_HEADS = {
    "any": "FFN widths and any number of heads (the same in every layer)",
    "divisors": "FFN widths, and numbers of heads that divide the hidden size {hidden} (the same in every layer)",
    "": "FFN widths (the same in every layer)",
    "none": "FFN widths only (the same in every layer); fewer heads need shapes uniform or per_layer",
}


def facts(model: Any, anatomy: Anatomy, name: str, sequence_length: int) -> list[str]:
    """What the model is, in a few lines."""
    blocks = cost_model(anatomy, "macs", sequence_length, "blocks").total(anatomy.sizes)
    macs = cost_model(anatomy, "macs", sequence_length, "model").total(anatomy.sizes)
    lines = [
        f"{name}: {type(model).__name__}, family {anatomy.model_type}, {str(model.dtype).removeprefix('torch.')}",
        f"parameters {count(anatomy.total_params)}, of them {count(anatomy.block_params)} in blocks; "
        f"MACs {count(macs)}, of them {count(blocks)} in blocks, at {anatomy.tokens(sequence_length)} tokens",
    ]
    if KEY in model.config.__dict__:
        entry = model.config.__dict__[KEY]
        lines.append(
            f"already pruned: {entry.get('shapes')} form, from {entry.get('base_model')}, "
            f"criterion {entry.get('criterion')}"
        )
    return lines


def anatomy_rows(anatomy: Anatomy, sequence_length: int) -> list[Row]:
    """One row a stack and kind, one for the vocabulary, and one for all else."""
    models = {
        "parameters": cost_model(anatomy, "params", sequence_length, "model"),
        "MACs": cost_model(anatomy, "macs", sequence_length, "model"),
    }
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in anatomy.sites:
        groups.setdefault((site.stack, site.kind), []).append(site)
    rows = [
        {"site": f"{stack} {kind}", "layers": str(len(sites)), "units of a layer": _units(sites)}
        | {name: _share(model, anatomy, sites) for name, model in models.items()}
        for (stack, kind), sites in groups.items()
    ]
    tokens = anatomy.sizes.get((), {}).get("tokens", 0)
    costs = {name: (model.token * tokens, model.wide(anatomy.sizes), model) for name, model in models.items()}
    words = {name: _cell(part, model.total(anatomy.sizes)) for name, (part, _, model) in costs.items()}
    rest = {name: _cell(wide - part, model.total(anatomy.sizes)) for name, (part, wide, model) in costs.items()}
    if tokens:
        rows.append({"site": "the vocabulary", "layers": "", "units of a layer": f"{tokens:,} tokens"} | words)
    return [*rows, {"site": "the rest", "layers": "", "units of a layer": "norms, positions, other heads"} | rest]


def _units(sites: Sequence[Site]) -> str:
    return " or ".join(dict.fromkeys(_unit(site) for site in sites))


def _unit(site: Site) -> str:
    inner, outer = site.inner.name, site.outer.name
    width = f" of {site.widths[inner]}" if site.widths[inner] > 1 else ""
    groups = f" in {site.sizes[outer]} {outer.replace('kv_', 'KV ')}" if site.share > 1 else ""
    return f"{site.sizes[inner]:,} {inner}{width}{groups}"


def _share(model: CostModel, anatomy: Anatomy, sites: Sequence[Site]) -> str:
    counts = anatomy.sizes
    part = sum(model.units[site.key].site(counts[site.key]) for site in sites)
    return _cell(part, model.total(counts))


def _cell(part: float, total: float) -> str:
    return f"{count(part)} ({part / total:.1%})"


def stock_note(anatomy: Anatomy) -> str:
    """What a stock config of the family can say."""
    family = anatomy.family
    text = f"A stock {family.model_type} config can say: "
    stock = next((site.inner.stock for site in anatomy.sites if site.inner.mixes), "")
    text += STOCK_HEADS[stock].format(hidden=anatomy.hidden_size)
    text += ", experts and their width" if any(site.routed for site in anatomy.sites) else ""
    if family.as_model_type:
        text += f"; saved as {family.as_model_type} (--shapes uniform --model-type {family.as_model_type}): any number"
    if any(extent.where == HIDDEN for extent in anatomy.extents):
        text += ". A narrower stream, too (--units hidden)"
    stem = next((site for site in anatomy.sites if site.is_stem), None)
    if stem is not None:
        shapes = " --shapes per_layer" if stem.inner.stock == "none" else ""
        text += (
            f". {stem.inner.name.capitalize()} in front of the layers can go, too (--units {stem.inner.name}{shapes})"
        )
    if any(site.inner.tied for site in anatomy.sites):
        text += ". All self-attention layers of a stack keep the same heads"
    if len(family.layered.stacks) > 1:
        text += ". Counts that differ between layers or stacks are kept under `hf_prune` in config.json (per_layer)"
    missing = "".join(f" No {unit} can go: {why}." for unit, why in family.refused)
    return f"{text}.{missing}"


def reachable_rows(anatomy: Anatomy, sequence_length: int, device: str) -> list[Row]:
    """The least `keep` per shapes, for both metrics."""
    rows: list[Row] = []
    for shapes in (shapes for shapes in SHAPES if shapes in anatomy.family.shapes):
        configs = [
            PruningConfig(shapes=shapes, metric=metric, sequence_length=sequence_length)
            for metric in ("macs", "params")
        ]
        units = dict.fromkeys(", ".join(choose_units(anatomy, config)) for config in configs)  # those of experts differ
        least = {f"{c.metric} ({c.scope})": _least(anatomy, c, default_align(anatomy, device)) for c in configs}
        rows.append({"shapes": shapes, "default units": "; ".join(units), **least})
    return rows


def _least(anatomy: Anatomy, config: PruningConfig, align: int) -> str:
    try:
        return f"{reachable(anatomy, config, align):.3f}"
    except ValueError:  # its layers differ already, and share no count
        return "none"
