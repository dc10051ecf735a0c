"""Typed run configuration: frozen dataclasses filled from one TOML file.

``load_config("ribonanza_mamba", ["train.lr=1e-3"])`` is the only way in which a value enters a run. Overrides are
parsed as TOML, so ``false`` is a bool. The model's own arguments are checked against its constructor by
``models.registry.create_model``.
"""

import math
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from pipeline.errors import ConfigError, did_you_mean

CONFIG_DIR = Path(__file__).resolve().parent / "configs"

#: Epochs that "auto" means, and the optimiser steps that they make at least: of a small set they are more. 10 epochs of
#: 256 sequences make 160 steps, too few to learn much from; pipeline/OWN_DATA.md has numbers.
AUTO_EPOCHS, AUTO_STEPS = 10, 600

_UNIONS = (typing.Union, types.UnionType)

#: Settings of a model that train what they add to initial weights, and heads, while all else stays as it was loaded.
FREEZING = {"lora_rank": "adapters", "soft_prompt": "soft prompts"}

#: Smallest and largest sensible value of a number; numbers that are not here may be any finite one.
_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_length", "epochs", "batch_size", "process_timeout"), (1, math.inf)),
    **dict.fromkeys(("crop", "length_bucket", "pseudo_weight", "micro_batch", "gradient_checkpointing"), (0, math.inf)),
    **dict.fromkeys(("lr", "weight_decay", "clip_norm", "lora_rank", "lora_alpha", "soft_prompt"), (0, math.inf)),
    **dict.fromkeys(("save_every", "patience", "max_skips", "max_rollbacks", "spike_threshold"), (0, math.inf)),
    **dict.fromkeys(("frame_weight", "tm_weight", "confidence_weight", "focal_gamma"), (0, math.inf)),
    **dict.fromkeys(("flip", "backbone_lr_share", "warmup"), (0, 1)),
    **dict.fromkeys(("focal_alpha", "class_balance"), (0, 1 - 1e-9)),
    "ema_decay": (0, 0.999999),
    "seed": (0, 2**63 - 1),
    "workers": (0, 64),  # each is a process of its own: 500 by a slip took a machine down
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, and its constructor's arguments."""

    name: str
    kwargs: dict[str, int | float | str | bool] = field(default_factory=dict)
    # whose weights to start from: a run's folder, of which each fold takes its own, or a checkpoint's; "" = none
    init: str = ""
    # of what adapters of low rank add to these weights, which stay as they are but for the heads (LoRA); 0 = all train
    lora_rank: int = 0
    lora_alpha: float = 16.0  # the adapters' sum counts alpha / rank times
    # vectors that are learned and stand before every sequence, with the heads alone in training (soft prompt); 0 = none
    soft_prompt: int = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the network sees of the tables."""

    max_length: int = 512  # nt; longer training sequences are cropped, predictions never
    crop: int = 0  # nt, odd; of a labelled set the middle of every sequence alone, in predictions too; 0 = all of it
    min_signal_to_noise: float = 0.0  # profiles below are left out of the loss
    weighting: typing.Literal["log1p_sn", "uniform"] = "log1p_sn"  # of a profile in the loss
    flip: float = 0.0  # probability of reversing a training sequence 5'-3'
    features: str = ""  # embeddings that every sequence comes with, by the NAME of make features; "" = none
    length_bucket: int = 64  # batches that are sorted by length together; 0 = no bucketing
    # runs whose predictions of the test set train too, commas between: for each fold its own networks'; "" = none
    pseudo: str = ""
    pseudo_weight: float = 0.5  # of each such sequence in the loss, as a share of a training profile's mean; 0 = none


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the network is trained."""

    seed: int = 2026
    epochs: int | typing.Literal["auto"] = 30  # "auto" = 10, and of small sets as many as make 600 optimiser steps
    # crops of the first epochs, as "<nt>x<epochs>,…": "64x1,128x1" is one epoch of at most 64 nt, one of 128, then
    # max_length; steps and batch_size stay (HyenaDNA's warm-up by length); "" = max_length from the start
    length_stages: str = ""
    batch_size: int = 64  # sequences an optimiser step, over all devices
    # sequences a forward pass: 0 = batch_size, less = gradient accumulation, "auto" = halved when memory runs out
    micro_batch: int | typing.Literal["auto"] = 0
    # "adamw", "muon", or the name of another of timm's, whose best lr is its own ("nadamw", "lion", …)
    optimizer: str = "adamw"
    lr: float = 2e-3
    # of what model.init began: its learning rate as a share of the new heads' lr; 0 keeps it as it was loaded
    backbone_lr_share: float = 1.0
    weight_decay: float = 0.05
    schedule: typing.Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    warmup: float = 0.1  # share of all steps in which the learning rate rises
    clip_norm: float = 1.0  # largest gradient norm; 0 = off
    ema_decay: float = 0.999  # of the averaged weights that predict; 0 = off
    precision: typing.Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: int = 0  # recompute every k blocks; 0 = keep activations
    save_every: int = 500  # steps between checkpoints; the end of an epoch always saves
    patience: int = 0  # epochs without improvement before stopping; 0 = never
    deterministic: bool = False
    workers: int = 0  # processes that read batches ahead, for each training process; 0 = none
    # of the network: "none" = all of it in each training process, "fsdp2" = a part, see pipeline.training.sharding
    sharding: typing.Literal["none", "fsdp2"] = "none"
    process_timeout: float = 300.0  # seconds after which one of several training processes that is silent is lost
    max_skips: int = 5  # batches in a row that may be left out for non-finite values or loss spikes
    max_rollbacks: int = 3
    # of targets in the loss, by name, where others weigh 1: {deg_pH10 = 0, deg_50C = 0}; of values and numbers
    target_weights: dict[str, float] = field(default_factory=dict)
    # terms of a structure's loss, beside distances, which weigh 1; they count where model.kwargs.coordinates is on
    frame_weight: float = 1.0  # of coordinates as seen from local frames
    tm_weight: float = 1.0  # of coordinates after superposition
    confidence_weight: float = 0.1  # of the confidence in them
    # of a labelled set: how much less a class counts the surer it is (Lin et al. 2017); 0 = cross-entropy
    focal_gamma: float = 0.0
    # what having a label weighs against 1 - alpha of not having it, where each is had or not: more recall, less
    # precision above 0.5; 0 = off
    focal_alpha: float = 0.0
    # and how much more a rare class counts: beta of the effective number of its sequences (Cui et al. 2019); 0 = off
    class_balance: float = 0.0
    # a loss so many robust standard deviations above the last 128 is a spike: its batch is left out; 0 = off, because
    # batches of another length or library may be that different; a try begins with 10 or more
    spike_threshold: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"([1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*)?", self.length_stages):
            raise ConfigError(
                f"[train] length_stages: got {self.length_stages!r}; expected <nt>x<epochs>, with commas between. "
                "Next: write '64x1,128x2', for example."
            )
        for name, weight in self.target_weights.items():
            if type(weight) not in (int, float) or not 0 <= weight < math.inf:
                raise ConfigError(
                    f"[train] target_weights: {name} = {weight!r}; expected a finite number of at least 0. Next: "
                    "correct the value."
                )
        if self.sharding == "fsdp2" and self.optimizer != "adamw":
            raise ConfigError(
                f"[train] optimizer: got {self.optimizer!r} with sharding = 'fsdp2', which knows 'adamw' alone. Next: "
                "leave one of the two out."
            )

    def settled(self, sequences: int) -> "TrainConfig":
        """With the number of epochs that "auto" means for so many training sequences.

        >>> TrainConfig(epochs="auto", batch_size=16).settled(250).epochs
        38
        """
        if self.epochs != "auto":
            return self
        batches = -(-sequences // self.batch_size)
        return replace(self, epochs=max(AUTO_EPOCHS, -(-AUTO_STEPS // batches)))

    @property
    def num_epochs(self) -> int:
        """Epochs of a run whose data are known."""
        assert isinstance(self.epochs, int), "see settled"
        return self.epochs

    @property
    def largest_micro_batch(self) -> int:
        """Sequences of a forward pass as a run begins; "auto" only ever makes them fewer."""
        given = self.batch_size if self.micro_batch == "auto" else self.micro_batch
        return min(given or self.batch_size, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run but its coordinates (competition, split, fold), which the command line gives."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def longest(self, epoch: int) -> int:
        """Nucleotides to which training sequences are cropped in an epoch, from 0; the epoch alone decides.

        Source:
            Nguyen et al. 2023, HyenaDNA, arXiv:2306.15794, section 3.2, where stages count steps.
        """
        for stage in filter(None, self.train.length_stages.split(",")):
            length, epochs = map(int, stage.split("x"))
            if epoch < epochs:
                return min(length, self.data.max_length)
            epoch -= epochs
        return self.data.max_length


def list_configs() -> list[str]:
    """Names of the shipped TOML files."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.toml"))


def find_config(name: str) -> Path:
    """A shipped config by name, or a TOML file by path.

    Raises:
        ConfigError: neither exists; the message names the closest known one.
    """
    path = Path(name) if name.endswith(".toml") else CONFIG_DIR / f"{name}.toml"
    if path.is_file():
        return path
    problem = ": no such file" if name.endswith(".toml") else " is not known"
    raise ConfigError(
        f"MODEL={name!r}{problem}; expected one of {', '.join(list_configs())}."
        f"{did_you_mean(path.stem, list_configs())} Next: name one of these, or give the path of a TOML file."
    )


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply ``section.key=value`` overrides, check every key and type.

    Raises:
        ConfigError: unknown file or key (with the closest known one), wrong type, missing key.
    """
    path = find_config(name)
    try:
        tree = tomllib.loads(path.read_text())
    except ValueError as err:  # no TOML, or no UTF-8
        raise ConfigError(f"{path.name}: not valid TOML: {err}. Next: correct that line.") from err
    for item in overrides:
        _apply_override(tree, item)
    return config_from_dict(tree, where=path.name)


def config_from_dict(tree: dict, *, where: str) -> RunConfig:
    """Check a nested dict, as TOML or a checkpoint's manifest gives it, against the schema."""
    return _build(RunConfig, tree, where=where)


def _apply_override(tree: dict, item: str) -> None:
    dotted, sep, raw = item.partition("=")
    if not sep:
        raise ConfigError(f"--set {item!r}: expected section.key=value. Next: train.lr=1e-3, for example.")
    try:
        (value,) = tomllib.loads(f"v = {raw}").values()
    except ValueError as err:  # no TOML, or more than one value
        kind = _kind_of(dotted)
        if kind and not _is_of(raw, kind):  # quotes would not help
            raise ConfigError(f"--set {item!r}: {raw!r}; expected {_name(kind)}. Next: correct the value.") from err
        advice = f"SET='{dotted}=\"{raw}\"'" if re.fullmatch(r"[\w./+-]+", raw) else "correct it"
        raise ConfigError(f"--set {item!r}: {raw!r} is no TOML value; quote strings. Next: {advice}.") from err
    *parents, leaf = dotted.strip().split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {item!r}: {name!r} is a value, not a section. Next: write section.key=value.")
    node[leaf] = value


def _kind_of(dotted: str) -> typing.Any:
    """Type of a setting; None where no section says one.

    >>> _kind_of("train.lr"), _kind_of("model.kwargs.width")
    (<class 'float'>, None)
    """
    kind: typing.Any = RunConfig
    for name in dotted.strip().split("."):
        kind = typing.get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def _build(cls: type, tree: dict, *, where: str) -> typing.Any:
    known = {f.name for f in fields(cls)}
    for key in tree:
        if key not in known:
            hint, all_of_them = did_you_mean(key, known), ", ".join(sorted(known))
            raise ConfigError(f"{where}: unknown key {key!r}.{hint} Next: write one of {all_of_them}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        kind, spot = hints[key], f"{where}: {key}"
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{spot}: got {value!r}; expected a section. Next: write [{key}] there.")
            values[key] = _build(typing.cast(type, kind), value, where=spot)
        else:
            values[key] = _check(value, kind, where=spot)
            _check_limits(key, values[key], where=spot)
    for needed in fields(cls):
        if needed.name not in values and needed.default is needed.default_factory is MISSING:
            raise ConfigError(f"{where}: {needed.name!r} is missing. Next: add it; pipeline/configs has examples.")
    return cls(**values)


def _check(value: object, kind: typing.Any, *, where: str) -> object:
    if kind is float and type(value) is int:
        return float(value)
    if _is_of(value, kind):
        return value
    got = f"{value!r} ({type(value).__name__})"
    raise ConfigError(f"{where}: got {got}; expected {_name(kind)}. Next: correct the value.")


def _is_of(value: object, kind: typing.Any) -> bool:
    origin = typing.get_origin(kind)
    if origin in _UNIONS:
        return any(_is_of(value, one) for one in typing.get_args(kind))
    return value in typing.get_args(kind) if origin is typing.Literal else type(value) is (origin or kind)


def _name(kind: typing.Any) -> str:
    if (origin := typing.get_origin(kind)) in (typing.Literal, *_UNIONS):
        return " or ".join(map(repr if origin is typing.Literal else _name, typing.get_args(kind)))
    return getattr(kind, "__name__", str(kind))


def _check_limits(key: str, value: object, *, where: str) -> None:
    if not isinstance(value, int | float):
        return
    low, high = _LIMITS.get(key, (-math.inf, math.inf))
    if not (low <= value <= high and math.isfinite(value)):
        least = f" of at least {low:g}" if math.isfinite(low) else ""
        most = f" and at most {high:g}" if math.isfinite(high) else ""
        raise ConfigError(f"{where}: got {value}; expected a finite number{least}{most}. Next: correct the value.")
