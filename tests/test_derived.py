"""Rows that a model's own config tells: the proof holds, can fail, and what is proven prunes, saves and reopens.

A sample that changes from day to day; all types with HF_PRUNE_FAMILIES=all (make test-families).
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_reload import reopen
from tiny import distance, snapshot, tiny_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from toy import ToyConfig, ToyModel

from hf_prune import PruningConfig, describe, prune, register_family, save_pretrained
from hf_prune.cli.main import main
from hf_prune.decide.costs import cost_model
from hf_prune.model import cut, derive, families, lookup, prove
from hf_prune.model.axes import Sublayer
from hf_prune.model.effects import Effect, Snapshot, effects, explicit
from hf_prune.model.feed import feeds, observed
from hf_prune.model.instance import build, instance, quiet
from hf_prune.report import families as table

KNOWN = {row["type"]: row for row in table.read()["rows"]}
RUN = sorted(name for name, row in KNOWN.items() if "why" not in row)
NAMED = (  # that people download
    "xlm-roberta", "camembert", "mpnet", "deberta-v2", "modernbert", "albert", "nomic_bert", "eurobert", "gpt_neox",
    "falcon", "bloom", "phi", "starcoder2", "olmo2", "granite", "smollm3", "cohere2", "glm4", "gpt_oss", "qwen3_5",
    "qwen3_5_moe", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gemma3", "gemma4", "llava",
    "qwen2_5_vl", "qwen3_vl", "smolvlm", "clip", "siglip", "dinov2", "dinov3_vit", "deit", "beit", "whisper",
    "wav2vec2", "hubert", "mt5", "umt5", "marian", "mbart", "pegasus", "m2m_100",
)  # fmt: skip
A_DAY = {"types": 6, "named": 4}
SECONDS = 5  # that a type takes at most to be proven, to be among those of a day: nine in ten


def todays(names, count):
    """A few quick ones that change from day to day; all, or those that HF_PRUNE_FAMILIES lists."""
    asked = os.environ.get("HF_PRUNE_FAMILIES", "")
    if asked:
        return sorted(names) if asked == "all" else [name for name in names if name in asked.split(",")]
    quick = [name for name in names if KNOWN[name]["seconds"] <= SECONDS]
    first, step = datetime.date.today().toordinal(), len(quick) // count  # kin, which stand side by side, on other days
    return sorted({quick[(first + i * step) % len(quick)] for i in range(count)})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(model):
    """What the config of a small instance tells, as `lookup.derivation` reads it: the subject, and its candidates."""
    cls = type(model)

    def on_meta(config):
        return build(cls, config, "meta", model.dtype)

    config, added = explicit(on_meta, model.config)
    if added:
        weights = model.state_dict()
        model = build(cls, config, dtype=model.dtype)
        model.load_state_dict(weights)
    found = [effect for effect in effects(on_meta, config) if isinstance(effect, Effect)]
    reading = lookup._reading(on_meta(config), found, added)
    return prove.Subject(model, feeds(model)), reading, list(derive.candidates(reading, derive.stacks(reading)))


def proven(subject, candidates):
    """(candidate, the stacks of the layout that is true) of all that is proven."""
    for candidate in candidates:
        for stacks in candidate.alternatives():
            if not prove.units(subject, stacks):
                yield candidate, stacks
                break


# --- effects ---------------------------------------------------------------------------------------------------------


def llama(**changes):
    with quiet():
        model = instance(transformers.LlamaConfig(**changes), transformers.LlamaForCausalLM)
    return model, lambda config: build(type(model), config, "meta")


def test_what_a_key_sizes():
    model, on_meta = llama()
    found = {effect.key: effect for effect in effects(on_meta, model.config) if isinstance(effect, Effect)}
    width = found["intermediate_size"]
    assert {name.rpartition(".layers.0.")[2] for name, _ in width.shapes if ".0." in name} == {
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip
    assert width.entries("model.layers.0.mlp.down_proj.weight", 1) == (1, 0)
    assert width.attributes["model.layers.0.mlp.intermediate_size"] == (width.old, width.new)
    assert found["num_attention_heads"].entries("model.layers.1.self_attn.q_proj.weight", 0) == (16, 0)
    assert found["num_hidden_layers"].gone
    assert not found["num_hidden_layers"].shapes
    assert "rms_norm_eps" not in found


def test_a_dimension_that_does_not_follow_evenly():
    effect = Effect("ratio", 4, 2, {("a", 0): (10, 5), ("b", 0): (12, 8)})
    with pytest.raises(ValueError, match="a goes from 10 to 5 entries where ratio goes to 2"):
        effect.entries("a", 0)
    assert effect.entries("b", 0) == (2, 4)


def test_silent_sizes_are_said_aloud():
    """Phi-3 has a head size that its config does not name: it is hidden size / heads until it is said."""
    with quiet():
        model = instance("phi3")
    config, added = explicit(lambda c: build(type(model), c, "meta"), model.config)
    assert added == ("head_dim",)
    assert config.head_dim == model.config.hidden_size // model.config.num_attention_heads
    assert not hasattr(transformers.PreTrainedConfig, "__getattr__")


def test_the_users_config_is_left_alone():
    model, _ = llama()
    before = copy.deepcopy(model.config.to_dict())
    state = snapshot(model)
    lookup.derived(type(model), model.config)
    assert model.config.to_dict() == before
    assert {name: state[name] for name in ()} == {}
    assert Snapshot.of(model) == Snapshot.of(build(type(model), model.config, "meta"))


# --- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", todays(RUN, A_DAY["types"]))
def test_what_the_table_says_is_proven_again(model_type):
    found = table.row_of(model_type)
    assert "why" not in found, found["why"]
    known = KNOWN[model_type]
    assert found["class"] == known["class"]
    assert found["derived"] == known["derived"]
    assert found["stock"] == known["stock"]
    assert found.get("differs", []) == known.get("differs", [])


def shifted(name):
    """`index_of` that keeps the units behind the right ones, of one tensor."""
    right = cut.index_of

    def index_of(part, kept, sizes, widths):
        if part.tensor == name:
            kept = {axis: [(unit + 1) % sizes[axis] for unit in units] for axis, units in kept.items()}
        return right(part, kept, sizes, widths)

    return index_of


@pytest.mark.parametrize("model_type", todays(RUN, A_DAY["types"]))
def test_no_proof_of_a_wrong_cut(model_type, monkeypatch):
    """The units behind the right ones are kept in one tensor: nothing of that is proven.

    Not of what cannot matter to any output, such as the bias of keys, which the softmax cancels.
    """
    with quiet():
        model = instance(model_type)
        subject, _, candidates = read(model)
        wrong, largest = [], max(float(slope.abs().max()) for slope in subject.slopes.values() if slope.numel())
        for candidate, stacks in proven(subject, candidates):
            for name in dict.fromkeys(p.tensor for stack in stacks for row in stack.sublayers for p in row.parts):
                slopes = [s for path, s in subject.slopes.items() if path.endswith(f".{name}")]
                if max((float(slope.abs().max()) for slope in slopes), default=largest) < 1e-5 * largest:
                    continue
                with monkeypatch.context() as patch:
                    patch.setattr(cut, "index_of", shifted(name))
                    if not prove.units(subject, stacks):
                        wrong.append(f"{candidate.word} {name}")
    assert wrong == []


def test_a_matrix_that_does_not_matter_proves_nothing():
    model, _ = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.zero_()
    subject, _, candidates = read(model)
    neurons = next(candidate for candidate in candidates if candidate.word == "neurons")
    assert "do not depend on model.layers.1.mlp" in prove.units(subject, neurons.stacks[0])


def test_a_low_rank_is_no_neuron(monkeypatch):
    """Two matrices with nothing between them: cut equals masked, and still no neurons."""
    model, _ = llama()
    mlp = type(model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, x: self.down_proj(self.gate_proj(x) + self.up_proj(x)))
    subject, _, candidates = read(model)
    neurons = next(candidate for candidate in candidates if candidate.word == "neurons")
    assert "rank of a product" in prove.units(subject, neurons.stacks[0])


def test_the_layout_that_is_true_is_found():
    """GLM-4's gate and up lie one behind the other; the other way is refused."""
    with quiet():
        subject, _, candidates = read(instance("glm4"))
    neurons = next(candidate for candidate in candidates if candidate.word == "neurons")
    assert len(neurons.stacks) == 2
    reasons = [prove.units(subject, stacks) for stacks in neurons.stacks]
    assert [bool(reason) for reason in reasons] == [False, True]
    assert "cut in place" in reasons[1]


# --- what is proven, in use ------------------------------------------------------------------------------------------


def units_of(anatomy):
    """The units to cut of a model: of its sites those that a stock config can say, else its layers."""
    stock = {axis.name for site in anatomy.sites for axis in site.row.axes if axis.stock != "none"}
    return [unit for unit in ("neurons", "kv_groups", "heads") if unit in stock][:1] or ["layers"]


def prune_small(model_type):
    """A small instance, cut with repair in stock shapes, and the plan."""
    if "vision" in {stack.name for stack in getattr(families.registered(model_type), "stacks", ())}:
        model = tiny_model(model_type)  # with pictures beside the texts
        data = [tiny_batch(model, seed=seed) for seed in range(4)]
        return model, data, prune(model, data, PruningConfig(keep=0.97, metric="params", units=["neurons"], align=1))
    with quiet():
        model = instance(model_type).float()
        given = [feed.inputs for seed in range(8) for feed in feeds(model, seed) if feed.method == "forward"]
        data = [{k: v.float() if v.is_floating_point() else v for k, v in batch.items()} for batch in given]
        config = PruningConfig(keep=0.97, metric="params", units=units_of(describe(model)), align=1)
        return model, data, prune(model, data, config)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_named_types_prune_save_and_reopen(tmp_path):
    """In stock shapes, by a process that does not know hf_prune."""
    jobs = []
    for name in todays(NAMED, A_DAY["named"]):
        model, data, result = prune_small(name)
        assert not result.plan.is_identity, name
        assert model.config.hf_prune["shapes"] == "stock", name
        save_pretrained(model, tmp_path / name, batches=data[:1])
        with torch.no_grad():
            kept = [x for x in model(**data[0]).to_tuple() if isinstance(x, torch.Tensor)]
        torch.save({"inputs": data[0], "outputs": kept}, tmp_path / f"{name}.pt")
        jobs.append({
            "name": name, "directory": str(tmp_path / name), "opener": type(model).__name__,
            "inputs": str(tmp_path / f"{name}.pt"),
            "options": {"attn_implementation": model.config._attn_implementation},
        })  # fmt: skip
    found = reopen(jobs, tmp_path, "blocked")
    assert {name: gap for name, gap in found.items() if not isinstance(gap, float) or gap > 1e-4} == {}


def texts_alone(model, seed):
    """A batch without pictures, nor the tokens that stand for them."""
    batch = {k: v for k, v in tiny_batch(model, seed=seed).items() if k in ("input_ids", "attention_mask", "labels")}
    return batch | {"input_ids": batch["input_ids"].where(batch["input_ids"] != model.config.image_token_id, 7)}


@pytest.mark.parametrize("shapes", ["stock", "per_layer"])
def test_a_tower_that_no_example_reaches_stays(shapes, tmp_path):
    model = tiny_model("smolvlm")
    data = [texts_alone(model, seed) for seed in range(4)]
    with pytest.warns(UserWarning, match="no batch holds a picture.*stays as it is"):
        result = prune(model, data, PruningConfig(keep=0.8, metric="params", shapes=shapes, align=1))
    kept = {stack: [k for k in result.plan.sites if k.where[0] == stack] for stack in ("text", "vision")}
    assert kept["vision"]
    assert all(k.is_identity for k in kept["vision"])
    assert not all(k.is_identity for k in kept["text"])
    assert result.report["keep"] <= 0.8
    save_pretrained(model, tmp_path / "small", batches=data[:1])


def test_pictures_with_some_texts_only():
    model = tiny_model("smolvlm")
    with pytest.raises(ValueError, match="1 of 2 batches hold no picture"):
        prune(model, [tiny_batch(model), texts_alone(model, 1)], PruningConfig(keep=0.8, metric="params"))


def test_layers_that_run_several_times_are_refitted_over_all_runs():
    """ALBERT's one layer runs three times here: the repair brings the output much closer."""
    with quiet():
        dense = instance("albert").float()
    ids = [torch.randint(24, 120, (16, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    gaps = {}
    for repair in ("none", "least_squares"):
        model = copy.deepcopy(dense)
        config = PruningConfig(
            keep=0.9, metric="params", units=["neurons"], align=1, repair=repair, criterion="magnitude"
        )
        prune(model, [{"input_ids": each} for each in ids[:-1]], config)
        with torch.no_grad():
            gaps[repair] = float((model(ids[-1])[0] - dense(ids[-1])[0]).square().mean())
    assert gaps["least_squares"] < gaps["none"] / 4


def test_a_class_that_nobody_wrote_a_row_for():
    """Of a package of its own: its layers and tokens are found; what reads three dimensions is refused aloud."""
    family = lookup.derived(ToyModel, ToyConfig())
    assert [(stack.layers, stack.axis.config) for stack in family.stacks] == [("layers", "num_layers")]
    assert family.tokens.config == "vocab_size"
    assert family.shapes == ("stock",)
    refused = dict(family.refused)
    assert "is among what it sizes" in refused["neurons"]


def test_sublayers_of_one_kind_are_told_apart():
    rows = [Sublayer(kind, (), ()) for kind in ("ffn", "attention", "ffn")]
    assert [row.kind for row in lookup._told_apart(rows)] == ["ffn", "attention", "ffn_2"]


# --- refusals --------------------------------------------------------------------------------------------------------


def small_xlm():
    with quiet():
        return instance("xlm").float()


def test_other_shapes_than_stock_need_a_row():
    model, ids = small_xlm(), torch.randint(24, 90, (8, 9))
    with pytest.raises(ValueError, match=r"shapes='per_layer'.*derived.*stock shapes only.*register_family"):
        prune(model, [{"input_ids": ids}], PruningConfig(shapes="per_layer", keep=0.9))


def test_units_that_cannot_go_say_why():
    model, ids = small_xlm(), torch.randint(24, 90, (8, 9))
    refused = dict(lookup.family_of(model).refused)
    unit = next(unit for unit in ("heads", "neurons") if unit in refused)
    with pytest.raises(ValueError, match=f"no {unit} of this xlm can go: "):
        prune(model, [{"input_ids": ids}], PruningConfig(units=[unit], keep=0.9))


def test_a_model_of_which_nothing_is_proven():
    sizes = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    model = transformers.SwinModel(transformers.SwinConfig(**sizes))
    with pytest.raises(ValueError, match=r"no family row for model_type 'swin'.*To add one.*register_family"):
        describe(model)


def test_register_family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    row = replace(families.FAMILIES["bert"], model_type="bert-of-mine")
    register_family(row)
    register_family(row)  # again the same
    assert families.registered("bert-of-mine") is row
    with pytest.raises(ValueError, match="has a row already"):
        register_family(replace(row, norm_offset=1.0))
    with pytest.raises(TypeError, match=r"takes a hf_prune\.model\.axes\.Family, got str"):
        register_family("bert")


def test_rows_of_other_packages(monkeypatch):
    """An entry point gives a row, several, or a function that makes them; asked for where a type is not known."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    rows = [replace(families.FAMILIES["bert"], model_type=f"bert-{i}") for i in range(4)]
    points = [rows[0], rows[1:3], lambda: rows[3]]
    found = [SimpleNamespace(load=lambda value=value: value) for value in points]
    monkeypatch.setattr(families, "entry_points", lambda group: found if group == "hf_prune.families" else [])
    families._load_entry_points.cache_clear()
    assert families.registered("bert-3") is rows[3]
    assert families.registered("bert-1") is rows[1]
    families._load_entry_points.cache_clear()


# --- the table and the commands --------------------------------------------------------------------------------------


def test_the_table_is_as_large_as_it_says():
    counts = table.counts(list(KNOWN.values()))
    assert len(RUN) >= 300
    assert counts["neurons"]["stock"] >= 220
    assert counts["layers"]["stock"] >= 260
    assert counts["tokens"]["stock"] >= 200
    assert counts["heads"]["stock"] >= 115
    assert counts["heads"]["per layer only"] >= 40
    assert counts["experts"]["stock"] >= 36
    assert counts["width of experts"]["stock"] >= 34
    assert all(row["why"] for row in KNOWN.values() if "why" in row)


def test_every_refusal_has_its_reason():
    for row in KNOWN.values():
        for unit in table.UNITS if "why" not in row else ():
            assert table.form_of(row, unit) or row["refused"][unit], (row["type"], unit)


def test_rows_by_hand_agree_with_the_derived_ones():
    """But for these, each with its reason."""
    assert {row["type"] for row in KNOWN.values() if row.get("differs")} == {*DIFFERENT}


DIFFERENT = {  # type -> why
    "lfm2": "the class works its width out of several keys: at a small size another of them is the width",
    "mistral3": "the row leaves the vision tower whole, whose patches have no axis of examples",
    "paligemma": "the one KV head of its small config: the derived row calls it no axis",
    "qwen2_5_vl": "as mistral3",
    "qwen3_5": "as mistral3",
    "qwen3_5_moe": "as mistral3",
    "qwen3_vl": "as mistral3",
}


def test_the_page_is_the_table():
    page = table.FILE.parents[2] / "examples" / "families.md"
    assert page.read_text() == table.markdown(table.read())


def test_families(capsys):
    assert main(["families", "bert", "resnet", "--json"]) == 0
    found = {row["type"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert found["bert"]["by"] == "hand"
    assert found["bert"]["per_layer"] == ["neurons", "heads"]
    assert found["resnet"]["refused"]["neurons"]
    assert main(["families", "bert"]) == 0
    assert "per layer" in capsys.readouterr().out
    assert main(["families", "no-such-type"]) == 2
    assert "no-such-type: no model type" in capsys.readouterr().err
    assert main(["families", "--save"]) == 2


def test_check_a_type_a_directory_and_code_of_its_own(capsys, tmp_path):
    assert main(["check", "distilbert"]) == 0
    text = capsys.readouterr().out
    assert "they agree" in text
    assert "hidden_dim" in text
    with quiet():
        instance("xlm").float().save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    assert "XLMWithLMHeadModel" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert "no directory with a config.json" in capsys.readouterr().err


def test_check_runs_the_code_that_a_model_brings(capsys, tmp_path):
    shutil.copy(Path(__file__).with_name("toy.py"), tmp_path / "toy.py")
    config = ToyConfig().to_dict() | {"auto_map": {"AutoConfig": "toy.ToyConfig", "AutoModel": "toy.ToyModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["check", str(tmp_path), "--trust-remote-code"]) == 0
    text = capsys.readouterr().out
    assert "ToyModel" in text
    assert "num_layers" in text


def test_observed_is_the_same_twice():
    with quiet():
        model = instance("bert")
    given = feeds(model)
    assert distance(observed(model, given), observed(model, given)) == 0


@pytest.mark.parametrize("family", ["clip", "siglip", "smolvlm", "llava", "gemma3"])
def test_macs_of_two_towers(family):
    """Each tower has tokens of its own. What joins them (a projector) counts a row for each token of the text."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    batch = {key: value[:1] for key, value in tiny_batch(model, padded=False).items() if key != "labels"}
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(**batch)
    anatomy = describe(model)
    macs = cost_model(anatomy, "macs", batch["input_ids"].shape[1], "model").total(anatomy.sizes)
    assert macs == pytest.approx(counted.get_total_flops() / 2, rel=0.05)
