"""Everything that a notebook without internet needs, in two folders that Kaggle's client sends.

    artifacts/<comp>/kernels/<slug>/code/      kernel.py and kernel-metadata.json: the notebook
                                    dataset/   MANIFEST.json, our wheel, wheels that the image lacks, settings, weights,
                                               of sets of one's own the clean tables

The data set is flat: Kaggle's client leaves folders out, and what packs them is unpacked there or not. The manifest
says where each file belongs, and its sha256.
"""

import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import words as bayes
from pipeline.competitions.base import Competition
from pipeline.config import find_config, load_config
from pipeline.errors import ConfigError, DataError
from pipeline.kernel import script
from pipeline.kernel.medians import training_medians
from pipeline.kernel.wheels import IMAGE, PYTHON, build_wheel, missing_wheels
from pipeline.labels import Classes, read_labels
from pipeline.paths import Paths
from pipeline.runs import STAGES, is_stage, read_run_name, weighted_runs
from pipeline.stage import Report, commit, read_result, sha256_file, sweep, versions, write_json
from pipeline.structure import predict as denovo
from pipeline.templates import predict as templates
from pipeline.training.checkpoint import CheckpointStore, DamagedError, export_weights, initial_checkpoint, read_meta
from pipeline.training.settings import require_sense

Mode = Literal["train", "predict"]

#: First word of the name of a run without a network -> its files that predict elsewhere.
_CARRIED = {"denovo": denovo.CARRIED, "templates": templates.CARRIED, "words": bayes.CARRIED}
_INITIAL = "initial"  # folder of the weights that a run begins with, among the artefacts of a training notebook
_WEIGHTS = "bundled/weights.json"  # the ensemble's, among those of a prediction notebook
_SLUG_LENGTH = 42  # Kaggle allows 50: a part's number and the data set's "-data" come to it
_MARGIN_S = 600.0  # kept at the end of a long session for saving and writing; of a short one, a tenth

_SECRET_NAMES = re.compile(
    r"(?i)kaggle\.json|access_token(\.txt)?|\.netrc|\.env|id_(rsa|ed25519)|.*\.pem|credentials(\.json)?"
)
_SECRETS = re.compile(
    rb"KGAT_[\w-]{10,}|\"key\"\s*:\s*\"[0-9a-f]{32}\"|(?i:bearer)\s+[\w.~+/-]{24,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|"
    rb"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|hf_[A-Za-z0-9]{30,}|(?:KAGGLE_KEY|WANDB_API_KEY)=[\w-]{16,}"
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a notebook is to do."""

    competition: Competition
    paths: Paths
    owner: str
    mode: Mode
    split: str
    model: str = ""  # train: config, and what varies it
    run: str = ""
    tag: str = ""
    overrides: Sequence[str] = ()
    folds: Sequence[int] = ()
    ensemble: str = ""  # predict: whose checkpoints and weights
    limit_s: float = 9 * 3600.0
    resume: str = ""  # owner/slug of the notebook whose output this one goes on from
    gpu: bool = True
    wheels: Path | None = None  # where fetched wheels are kept; None = below the artefacts


def build(order: Order) -> Report:
    """Write ``kernels/<slug>/{code,dataset}``, complete or not at all.

    Raises:
        ConfigError: no owner, a model that is not known, no setuptools to build the wheel with, or predictions for a
            set that is no competition of Kaggle's (exit code 2).
        DataError: a checkpoint, an ensemble or tables that are to be packed are absent or damaged, or a file looks
            like a credential (3).
        NetworkError: a wheel that the image lacks is not here and cannot be fetched (6).
    """
    started = time.monotonic()
    _check(order)
    slug = slug_of(order)
    home = order.paths.kernel_dir(slug)
    part = home.with_name(f".{slug}.part-{os.getpid()}")
    sweep(home)
    try:
        dataset, code = part / "dataset", part / "code"
        parcel = _Parcel(dataset)
        settings = (_train_settings if order.mode == "train" else _predict_settings)(order, parcel)
        fetched = order.wheels or order.paths.root / "wheels"
        wheels = [build_wheel(dataset), *missing_wheels(fetched, dataset, uses_bpp=settings["bpp"])]
        files = parcel.entries()
        told: dict[str, Any] = {"bundle": slug, "mode": order.mode, "competition": order.competition.name}
        told |= {"slug": order.competition.slug, "task": order.competition.task, "raw_files": order.competition.files}
        told |= settings
        told |= {"files": files, "limit_s": order.limit_s, "margin_s": _MARGIN_S, "python": PYTHON, "image": IMAGE}
        _write_code(order, slug, code, sources=[order.competition.slug] if told["raw_files"] else [])
        told |= {"code": {path.name: sha256_file(path) for path in sorted(code.iterdir())}}
        write_json(dataset / "MANIFEST.json", told | {"commit": commit(), "versions": versions()})
        about = {"id": f"{order.owner}/{slug}-data", "title": f"{slug}-data".replace("-", " ")}
        write_json(dataset / "dataset-metadata.json", about | {"licenses": [{"name": "other"}]})
        refuse_secrets(part)
        _replace(part, home)
    finally:
        sweep(home)
    size = sum(entry["bytes"] for entry in files.values())
    return Report(
        stage="kernel",
        status="built",
        outputs={"code": home / "code", "dataset": home / "dataset"},
        facts={"slug": slug, "files": len(files), "bytes": size, "wheels": wheels},
        seconds=time.monotonic() - started,
    )


def slug_of(order: Order) -> str:
    """Name of the notebook in Kaggle's addresses, different for everything that is another run.

    Going on from a notebook of the same name takes the next number: one cannot read its own output.
    """
    part = f"fold{order.folds[0]}" if len(order.folds) == 1 else "all folds"
    what = f"{order.run} {part}" if order.mode == "train" else f"predict {order.ensemble}"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{order.competition.name} {what}".lower()).strip("-")
    if len(slug) > _SLUG_LENGTH:
        slug = f"{slug[: _SLUG_LENGTH - 7].rstrip('-')}-{hashlib.sha256(slug.encode()).hexdigest()[:6]}"
    found = re.fullmatch(rf"{slug}(?:-(\d+))?", order.resume.rpartition("/")[2])
    return f"{slug}-{int(found.group(1) or 1) + 1}" if found else slug


def read_bundle(home: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all what they were when it was built.

    Raises:
        DataError: there is no bundle, or a file of it is absent or changed.
    """
    told = read_result(home / "dataset" / "MANIFEST.json", hint="make kernel")
    for name, entry in told["files"].items():
        path = home / "dataset" / name
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise DataError(f"{path}: absent or changed since it was packed. Next: make kernel packs it again.")
    of_this = told.get("code", dict.fromkeys(("kernel.py", "kernel-metadata.json")))  # of older bundles, no sha256
    for name, digest in of_this.items():
        path = home / "code" / name
        if not path.is_file() or digest not in (None, sha256_file(path)):
            raise DataError(f"{path}: absent, or of another bundle than {home / 'dataset'}. Next: make kernel again.")
    return told


def refuse_secrets(folder: Path) -> None:
    """Look at every file's name and content, inside wheels too.

    Raises:
        DataError: one looks like a credential; its place is named, its content is not.
    """
    own = [os.environ.get(name, "").encode() for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN")]
    for where, name, content in _contents(folder):
        if _SECRET_NAMES.fullmatch(name) or _SECRETS.search(content) or any(s in content for s in own if len(s) >= 8):
            raise DataError(f"{where}: looks like a credential; nothing was packed. Next: remove it from what is sent.")


def _contents(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Place, name and bytes of every file, those in wheels among them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as opened:
                yield from ((f"{path}: {name}", Path(name).name, opened.read(name)) for name in opened.namelist())
        elif path.is_file():
            yield str(path), path.name, path.read_bytes()


def _check(order: Order) -> None:
    if order.mode == "predict":
        order.competition.require_kaggle("kernel")
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{2,}", order.owner):
        raise ConfigError(
            f"OWNER={order.owner!r}: expected your user name on Kaggle: 3 or more letters, digits, - and _, of which "
            "the first is a letter or digit. Next: make kernel OWNER=<user>."
        )
    if order.resume and not re.fullmatch(r"[\w-]+/[\w-]{5,}", order.resume):
        raise ConfigError(
            f"RESUME={order.resume!r}: expected owner/slug of a notebook. Next: make kernel RESUME=owner/slug."
        )
    if order.limit_s < 60:
        raise ConfigError(f"LIMIT of {order.limit_s:.0f} s: expected at least 1m. Next: LIMIT=9h, for example.")


# --- what each mode brings ---


class _Parcel:
    """The data set, whose folder is flat, and where its files belong among the artefacts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._places: dict[str, list[str]] = {}

    def add(self, source: Path | str, place: str, *, name: str = "") -> None:
        """Pack a file or a text, under the name of its place unless one is given; one name may have more places."""
        file = self.folder / (name or place.replace("/", "."))
        if isinstance(source, str):
            file.write_text(source)
        else:
            shutil.copyfile(source, file)
        self._places.setdefault(file.name, []).append(place)

    def add_weights(self, checkpoint: Path, folds: Sequence[str], *, name: str, finished: bool) -> dict[str, Any]:
        """Copy a checkpoint's weights and settings as ``<name>.<file>``, for these folds' folders; returns its meta.

        Raises:
            DataError: it is absent or damaged.
        """
        aside = self.folder / "aside"
        try:
            export_weights(checkpoint, aside, finished=finished)
            meta = read_meta(checkpoint)
        except (DamagedError, OSError) as err:
            raise DataError(
                f"{checkpoint}: cannot be packed: {err}. Next: correct the path, or make train again."
            ) from err
        for path in aside.iterdir():
            homes = [f"{fold}/checkpoints/step-{meta['step']:08d}/{path.name}" for fold in folds]
            self._places[path.rename(self.folder / f"{name}.{path.name}").name] = homes
        aside.rmdir()
        return meta

    def entries(self) -> dict[str, dict[str, Any]]:
        """Name -> sha256, size and, of what is placed, places."""
        found = {}
        for path in sorted(self.folder.iterdir()):
            found[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            found[path.name] |= {"places": self._places[path.name]} if path.name in self._places else {}
        return found


def _train_settings(order: Order, parcel: _Parcel) -> dict[str, Any]:
    config = load_config(order.model, order.overrides)
    if config.data.features:
        raise _reads_features(f"data.features = {config.data.features!r}")
    if config.data.pseudo:
        raise ConfigError(
            f"kernel: data.pseudo = {config.data.pseudo!r}: predictions of these runs do not travel, and the notebook "
            "makes its fold table anew, so nothing would show that they held out the same fold; expected no "
            "pseudo-labels in a training notebook. Next: make train here, or leave data.pseudo out."
        )
    require_sense(config, order.competition, paths=order.paths)
    toml = find_config(order.model)
    shutil.copyfile(toml, parcel.folder / toml.name)
    words = ["--model", toml.name, "--split", order.split]
    words += ["--tag", order.tag] if order.tag else []
    words += [word for change in order.overrides for word in ("--set", change)]
    words += ["--fold", str(order.folds[0])] if len(order.folds) == 1 else ["--all-folds"]
    if order.competition.is_own:
        _pack_clean(order, parcel)
    if config.model.init:
        _pack_initial(Path(config.model.init), order.folds, parcel)
        words += ["--set", f'model.init="artifacts/{order.competition.name}/{_INITIAL}"']  # as the script sees it
    return ({"raw_files": []} if order.competition.is_own else {}) | {
        "config": toml.name,
        "run": order.run,
        "split": order.split,
        "fold_names": [f"fold{fold}" for fold in order.folds],
        "words": words,
        "resume": order.resume,
        "bpp": bool(config.model.kwargs.get("use_bpp")) or order.competition.task == "structure",
    }


def _pack_initial(given: Path, folds: Sequence[int], parcel: _Parcel) -> None:
    """The weights that a run begins with, as a run's folder; what several folds begin with is packed once."""
    sources = {fold: initial_checkpoint(given, fold=fold) for fold in folds}
    for number, source in enumerate(dict.fromkeys(sources.values())):
        homes = [f"{_INITIAL}/fold{fold}" for fold, each in sources.items() if each == source]
        parcel.add_weights(source, homes, name=f"initial{number}", finished=True)


def _predict_settings(order: Order, parcel: _Parcel) -> dict[str, Any]:
    """Pack an ensemble's weights and, of runs that have some, checkpoints or what a stage without a network learned."""
    source = order.paths.ensemble_dir(order.ensemble) / "weights.json"
    told = read_result(source, hint=f"make ensemble COMP={order.competition.name} NAME={order.ensemble}")
    runs = weighted_runs(told)
    stages = [run for run in runs if is_stage(run)]
    networks = [run for run in runs if not is_stage(run)]
    for run in stages:
        _pack_stage(order.paths, run, parcel)
    uses_bpp = [
        _pack_checkpoint(order.paths, run, fold, parcel, name=f"run{number}.fold{fold}")
        for number, run in enumerate(networks)
        for fold in told["folds"]
    ]
    parcel.add(source, _WEIGHTS, name=source.name)
    if order.competition.task == "values" and (medians := training_medians(order.paths, order.competition)):
        told_medians = {"targets": order.competition.targets, "medians": medians}
        parcel.add(json.dumps(told_medians), "ensembles/kernel/medians.json", name="medians.json")
    else:
        medians = {}
    read = [name for name in order.competition.files if name.startswith("test")]  # a sample may be absent
    reading = _pack_reading(order, told["split"], parcel) if order.competition.is_own else {"raw_files": read}
    return reading | {
        "beside": order.competition.files,
        "fill": bool(medians) or order.competition.task == "structure",
        "weights": _WEIGHTS,
        "folds": told["folds"],
        "words_of_runs": [_words_of(run) for run in networks],
        "stages": [
            {"verb": STAGES[run.partition(".")[0]], "words": ["--split", told["split"]], "source": f"learned/{run}"}
            for run in stages
        ],
        "bpp": any(uses_bpp) or order.competition.task == "structure",
    }


def _pack_clean(order: Order, parcel: _Parcel) -> None:
    """Pack the clean tables of a set of one's own: only here is it known how its raw files are to be read."""
    paths = order.paths
    if order.competition.has_labels:
        read_labels(paths)
    read_result(_data_manifest(paths), hint=f"make data COMP={paths.comp}")
    tables = [path for name in order.competition.tables if (path := paths.clean(name)).is_file()]
    for path in (*tables, _data_manifest(paths)):
        parcel.add(path, f"clean/{path.name}")


def _data_manifest(paths: Paths) -> Path:
    return paths.clean("train").with_name("data.manifest.json")


def _pack_reading(order: Order, split: str, parcel: _Parcel) -> dict[str, Any]:
    """Pack what is predicted, and how a hidden test set is to be read and decided; which raw files are looked for."""
    paths, manifest = order.paths, _data_manifest(order.paths)
    labels = read_labels(paths) if order.competition.has_labels else None
    made = read_result(manifest, hint=f"make data COMP={paths.comp}")
    if "test" not in made["inputs"]:
        raise DataError(
            f"{manifest}: the data have no table of test sequences; expected one like that which a notebook is to "
            "predict. Next: put test.csv or the like beside the training file, then make data."
        )
    told = made["facts"].get("columns", {})  # a hidden test set has no labels to tidy
    settings = {name: value for name, value in told.items() if name not in ("merge", "min_count", "groups")}
    if labels:
        settings |= {"alphabet": "nucleotides" if labels.is_nucleic else "amino acids"}
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()]
    parcel.add("".join(lines), "raw/columns.toml", name="columns.toml")
    kind = labels.kind if labels else "profiles"
    parcel.add(paths.clean(kind), f"clean/{kind}.parquet")
    sample = ["sample_submission"] if "sample" in made["inputs"] else []
    if sample and isinstance(labels, Classes) and not labels.exclusive:  # thresholds are learned from these
        parcel.add(paths.clean("train"), "clean/train.parquet")
        parcel.add(paths.fold_table(split), f"folds/{split}.parquet")
        for name in ("oof.parquet", "weights.json"):
            parcel.add(paths.ensemble_dir(order.ensemble) / name, f"ensembles/kernel/{name}")
    return {"raw_files": ["test", *sample]}


def _pack_stage(paths: Paths, run: str, parcel: _Parcel) -> None:
    """What a stage without a network learned; a file that several of them have is packed once."""
    kind = run.partition(".")[0]
    for name in _CARRIED[kind]:
        path = paths.run_dir(run) / name
        if not path.is_file():
            raise DataError(f"{path}: absent, so {run} cannot be packed. Next: make {STAGES[kind]}.")
        parcel.add(path, f"learned/{run}/{name}", name=f"{sha256_file(path)[:12]}.{name}")


def _pack_checkpoint(paths: Paths, run: str, fold: int, parcel: _Parcel, *, name: str) -> bool:
    """The weights that predict; whether they read pairing probabilities."""
    checkpoint, finished = _best(paths, run, fold)
    data = parcel.add_weights(checkpoint, [f"runs/{run}/fold{fold}"], name=name, finished=finished)["data"]
    if "features" in data:
        raise _reads_features(f"{run} fold{fold} reads features")
    return "bpp" in data


def _reads_features(what: str) -> ConfigError:
    return ConfigError(
        f"kernel: {what}: embeddings do not travel, and of hidden test sequences there are none; expected networks "
        "that read letters and pairing alone. Next: make train, predict and submit here, or leave these networks out."
    )


def _best(paths: Paths, run: str, fold: int) -> tuple[Path, bool]:
    """The checkpoint that predicts, and whether its training was finished."""
    store = CheckpointStore(paths.fold_dir(run, fold) / "checkpoints")
    newest = store.newest_meta()
    if newest is None:
        raise DataError(f"{store.folder}: no checkpoint to pack. Next: make train FOLD={fold}, or make kernel-pull.")
    path = store.best_folder()
    try:
        read_meta(path)
    except DamagedError as err:
        raise DataError(f"{path}: damaged: {err}. Next: make train FOLD={fold}.") from err
    return path, bool(newest["progress"]["finished"])


def _words_of(run: str) -> list[str]:
    """The options that name a run on the command line."""
    model, tag, split = read_run_name(run)
    return ["--model", model, "--split", split, *(["--tag", tag] if tag else [])]


# --- what Kaggle's client reads ---


def _write_code(order: Order, slug: str, code: Path, *, sources: Sequence[str]) -> None:
    code.mkdir()
    text = Path(script.__file__).read_text()
    (code / "kernel.py").write_text(text.replace('"@bundle@"', json.dumps(slug)))
    write_json(
        code / "kernel-metadata.json",
        {
            "id": f"{order.owner}/{slug}",
            "title": slug.replace("-", " "),
            "code_file": "kernel.py",
            "language": "python",
            "kernel_type": "script",
            "is_private": True,
            "enable_gpu": order.gpu,
            "enable_tpu": False,
            "enable_internet": False,  # the client's own default is true
            **({"machine_shape": "NvidiaTeslaT4"} if order.gpu else {}),  # two T4; the P100 runs no current torch
            "dataset_sources": [f"{order.owner}/{slug}-data"],
            "competition_sources": list(sources),
            "kernel_sources": [order.resume] if order.resume else [],
            "model_sources": [],
            "keywords": [],
        },
    )


def _replace(part: Path, home: Path) -> None:
    """Give the new bundle its name; an output that was fetched stays beside it."""
    home.mkdir(parents=True, exist_ok=True)
    for name in ("code", "dataset"):
        shutil.rmtree(home / name, ignore_errors=True)
        (part / name).rename(home / name)


def describe(facts: Mapping[str, Any]) -> list[str]:
    """What `build` packed, in lines."""
    lines = [f"{facts['slug']}: {facts['files']} files, {facts['bytes'] / 2**20:.1f} MiB"]
    return [*lines, *(f"  {wheel}" for wheel in facts["wheels"])]
