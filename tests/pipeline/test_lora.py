"""A run that trains adapters and heads alone, on the weights of another run."""

import contextlib
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from models.adapters import LowRank, merge_adapters, plain_state
from models.encoder import RnaEncoder
from models.heads import is_head
from models.interface import RnaInputs, RnaOutputs
from pipeline import embed, predict, train
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.errors import ConfigError, StoppedError
from pipeline.network import build_model
from pipeline.paths import Paths
from pipeline.training import initial
from pipeline.training.checkpoint import CheckpointStore, load_weights
from pipeline.training.initial import load_fitting
from pipeline.training.settings import require_sense
from tests.pipeline import tiny

NEXT = f"next.{tiny.SPLIT}"
KWARGS = {"width": 16, "depth": 2, "num_heads": 2, "ffn_expand": 2}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths)
    return paths


def settings(init: str = "", *, rank: int = 0, prompt: int = 0, depth: int = 2, **more) -> RunConfig:
    added = {"lora_rank": rank, "soft_prompt": prompt}
    return RunConfig(
        model=ModelConfig(name="transformer_sepconv", kwargs=KWARGS | {"depth": depth}, init=init, **added),
        data=DataConfig(max_length=40),
        train=TrainConfig(**{"epochs": 2, "batch_size": 8, "lr": 1e-2, "seed": 3, **more}),
    )


@pytest.fixture
def begun(paths: Paths) -> str:
    """The checkpoint of a finished run."""
    return str(tiny.fit(paths, settings(epochs=1)).outputs["checkpoint"])


def test_only_adapters_and_heads_change(paths, begun, capsys):
    tiny.fit(paths, settings(begun, rank=2), run=NEXT)
    assert "of the parameters train (" in capsys.readouterr().err
    config = settings(begun, rank=2)
    model = train.build_model(config.model, tiny.TINY)
    model.load_state_dict(load_weights(CheckpointStore(paths.fold_dir(NEXT, 0) / "checkpoints").best_folder()))
    before = load_weights(Path(begun))
    after = plain_state(model)
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if is_head(name)}
    assert all(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if name.endswith(".up"))


def test_of_a_soft_prompt_its_vectors_and_heads_alone_change_and_it_predicts_what_it_learned(paths, begun, capsys):
    config = settings(begun, prompt=3)
    tiny.fit(paths, config, run=NEXT)
    assert "of the parameters train (" in (told := capsys.readouterr().err)
    assert "soft prompts and heads" in told
    folder = CheckpointStore(paths.fold_dir(NEXT, 0) / "checkpoints").best_folder()
    before, after = load_weights(Path(begun)), load_weights(folder)
    assert after.keys() - before.keys() == {"prompt_ND"}
    assert after["prompt_ND"].shape == (3, 16)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, tiny.TINY).eval()
    assert (after["prompt_ND"] != model.state_dict()["prompt_ND"]).all()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if is_head(name)}
    table = pl.read_parquet(predict.run(competition=tiny.TINY, paths=paths, run=NEXT, fold=0).outputs["test"])
    name, values = table["sequence_id"][0], table[tiny.TARGETS[0]][0]
    (sequence,) = pl.read_parquet(paths.clean("test")).filter(sequence_id=name)["sequence"]
    model.load_state_dict(after)
    tokens_BL = torch.tensor([["ACGU".index(letter) for letter in sequence]])
    with torch.no_grad():
        expected_L = model(RnaInputs(tokens_BL, tokens_BL >= 0)).values_BLC[0, :, 0]
    assert values.to_list() == pytest.approx(expected_L.tolist(), abs=1e-5)


def test_a_run_may_begin_with_a_prompted_one_whose_prompt_it_leaves(paths, begun):
    tiny.fit(paths, settings(begun, prompt=3, epochs=1), run=NEXT)
    tiny.fit(paths, settings(str(paths.fold_dir(NEXT, 0).parent), rank=2, epochs=1), run="more.sim80_k2")
    facts = tiny.rows_of(paths, "start", run="more.sim80_k2")[0]["initial"]
    assert (facts["backbone"], facts["ignored"]) == (1.0, ["prompt_ND"])


def test_predictions_are_of_merged_weights(paths, begun, monkeypatch):
    tiny.fit(paths, settings(begun, rank=2, epochs=1), run=NEXT)
    adapted, compute = list[bool](), RnaEncoder.forward

    def told(model: RnaEncoder, inputs: RnaInputs) -> RnaOutputs:
        adapted.append(any(isinstance(module, LowRank) for module in model.modules()))
        return compute(model, inputs)

    monkeypatch.setattr(RnaEncoder, "forward", told)
    predict.run(competition=tiny.TINY, paths=paths, run=NEXT, fold=0, which=("test",))
    assert set(adapted) == {False}


def test_it_predicts_and_embeds_what_it_learned(paths, begun):
    report = tiny.fit(paths, settings(begun, rank=2), run=NEXT)
    first = pl.read_parquet(predict.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=0).outputs["oof"])
    second = pl.read_parquet(predict.run(competition=tiny.TINY, paths=paths, run=NEXT, fold=0).outputs["oof"])
    truth = pl.read_parquet(paths.clean("train")).filter(pl.col("scored"))
    name = tiny.TARGETS[0]

    def error(table: pl.DataFrame) -> float:
        both = table.join(truth, on="sequence_id", suffix="_true").select(name, f"{name}_true").explode(pl.all())
        return float((both[name].clip(0, 1) - both[f"{name}_true"].clip(0, 1)).abs().drop_nans().mean())  # type: ignore[arg-type]

    assert error(second) < error(first)
    job = embed.run(paths.clean("test"), competition=tiny.TINY, paths=paths, run=NEXT, fold=0)
    assert job.facts["sequences"] == 9
    assert report.facts["steps"] == 8


@pytest.mark.parametrize("added", [{"rank": 2}, {"prompt": 3}], ids=["adapters", "prompt"])
def test_a_run_stopped_after_every_step_ends_with_the_same_bits(paths, begun, added):
    config = settings(begun, epochs=1, **added)
    tiny.fit(paths, config, run=NEXT)
    for _ in range(5):
        with contextlib.suppress(StoppedError):
            tiny.fit(paths, config, run="again.sim80_k2", max_steps=1)
    assert tiny.final_bytes(paths, "again.sim80_k2") == tiny.final_bytes(paths, NEXT)


def test_weights_of_another_shape_are_refused_where_they_would_stay_as_drawn(paths, begun):
    tiny.fit(paths, settings(begun, depth=3, epochs=1), run=NEXT)  # without adapters they train
    with pytest.raises(ConfigError, match=r"only \d+% of the backbone fit, and lora_rank freezes all of it"):
        tiny.fit(paths, settings(begun, rank=2, depth=3), run="other.sim80_k2")


@pytest.mark.parametrize("changes", [{"init": ""}, {"sharding": "fsdp2"}], ids=["from scratch", "sharded"])
def test_what_adapters_cannot_do_is_refused(paths, changes):
    init = changes.pop("init", "somewhere")
    with pytest.raises(ConfigError, match=r"lora_rank = 2: adapters need .* Next: "):
        tiny.fit(paths, settings(init, rank=2, **changes))


@pytest.mark.parametrize("added", ["rank", "prompt"])
def test_settings_that_add_to_a_network_make_sense(tmp_path, added):
    """Tried on the device "meta", adapters said "unsupported scalarType"."""
    config, where = settings("a", **{added: 2}), Paths(comp="tiny", root=tmp_path)
    require_sense(config, tiny.TINY, paths=where)
    other = replace(config, model=replace(config.model, kwargs=config.model.kwargs | {"num_heads": 3}))
    with pytest.raises(ConfigError, match="num_heads 3"):
        require_sense(other, tiny.TINY, paths=where)


@pytest.mark.parametrize(
    "changes", [{"train": {"backbone_lr_share": 0.0}}, {"model": {"lora_alpha": 0.0}}], ids=["rate", "alpha"]
)
def test_adapters_that_cannot_learn_are_refused(paths, changes):
    config = settings("somewhere", rank=2)
    parts = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    with pytest.raises(ConfigError, match=r"adapters learn nothing then\. Next: "):
        tiny.fit(paths, replace(config, **parts))


def test_all_of_a_backbone_is_loaded_below_the_adapters():
    adapted = ModelConfig(name="transformer_sepconv", lora_rank=2, kwargs=KWARGS)
    model, plain = (train.build_model(config, tiny.TINY) for config in (adapted, replace(adapted, lora_rank=0)))
    found = load_fitting(model, plain.state_dict())
    assert found.share == 1
    assert torch.equal(plain_state(model)["norm.weight"], plain.state_dict()["norm.weight"])


def test_a_run_begins_with_what_another_ones_adapters_learned(paths, begun, monkeypatch):
    adapted = tiny.fit(paths, settings(begun, rank=2), run=NEXT).outputs["checkpoint"]
    network = train.build_model(settings(begun, rank=2).model, tiny.TINY)
    network.load_state_dict(load_weights(adapted))
    merge_adapters(network)
    began = []

    def told(model, weights, **how):
        found = load_fitting(model, weights, **how)
        began.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return found

    monkeypatch.setattr(initial, "load_fitting", told)
    report = tiny.fit(paths, settings(str(adapted), epochs=1), run="third.sim80_k2")
    assert report.facts["steps"] == 4
    torch.testing.assert_close(began[0], dict(network.state_dict()))
