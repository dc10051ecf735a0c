"""Where files live: one place that names every artefact of every stage."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

#: Folder of this checkout, or the one that the packages are installed in; locks are found from here.
REPOSITORY = Path(__file__).resolve().parents[1]
#: False of an installed package, whose submissions and their log belong where one works, not among packages.
IS_CHECKOUT = (REPOSITORY / "pyproject.toml").is_file()
#: Weights that come with the program: a folder for each, laid out like a run's, its card in it.
PRETRAINED = REPOSITORY / "models" / "pretrained"
_HOME = REPOSITORY if IS_CHECKOUT else Path()

#: Folder of a competition's artefacts -> the make target that fills it.
_TARGETS = {"clean": "data", "bpp": "bpp", "folds": "folds", "runs": "train", "ensembles": "ensemble"} | {
    "features": "features"
}


def how_to_make(path: Path) -> str:
    """The command that writes an artefact, for the end of a message.

    >>> how_to_make(Path("artifacts/rna3d/clean/train.parquet"))
    'make data COMP=rna3d'
    >>> how_to_make(Path("artifacts/rna3d/folds/sim80_k5.parquet"))
    'make folds COMP=rna3d SPLIT=sim80_k5'
    >>> how_to_make(Path("artifacts/rna3d/ensembles/best/test.parquet"))
    'make ensemble COMP=rna3d NAME=best'
    >>> how_to_make(Path("elsewhere.parquet"))
    'run the stage that writes it (make help)'
    """
    for folder in path.parents:
        if folder.name in _TARGETS and folder.parent.name:
            which = {"folds": f" SPLIT={path.stem}", "ensembles": f" NAME={path.parent.name}"}
            which |= {"features": f" NAME={path.parent.name} FILE=<folder or parquet>"}
            return f"make {_TARGETS[folder.name]} COMP={folder.parent.name}{which.get(folder.name, '')}"
    return "run the stage that writes it (make help)"


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Files of one competition below one artifacts folder.

    ``artifacts/<comp>/raw|clean|bpp|features/<name>|arrays|folds|runs/<run>/fold<k>|embeddings/<file>|predictions/<file>|
    ensembles/<name>``
    """

    comp: str
    root: Path = Path("artifacts")
    submissions: Path | None = None  # folder of the submission files, where it is another than `csv_dir` says

    @property
    def home(self) -> Path:
        return self.root / self.comp

    @property
    def raw(self) -> Path:
        return self.home / "raw"  # what a download leaves

    def clean(self, table: str) -> Path:
        return self.home / "clean" / f"{table}.parquet"

    @property
    def bpp(self) -> Path:
        return self.home / "bpp" / "bpp.parquet"

    def features(self, name: str, table: str) -> Path:
        return self.home / "features" / name / f"{table}.npy"

    def features_manifest(self, name: str) -> Path:
        return self.home / "features" / name / "features.manifest.json"

    @property
    def arrays_dir(self) -> Path:
        return self.home / "arrays"

    def fold_table(self, split: str) -> Path:
        return self.home / "folds" / f"{split}.parquet"

    def run_dir(self, run: str | Path) -> Path:
        return self.home / "runs" / run  # the path of one that lies elsewhere, absolute, stays as it is

    def fold_dir(self, run: str | Path, fold: int) -> Path:
        return self.run_dir(run) / f"fold{fold}"

    def oof(self, run: str | Path, fold: int) -> Path:
        return self.fold_dir(run, fold) / "oof.parquet"

    def test(self, run: str, fold: int) -> Path:
        return self.fold_dir(run, fold) / "test.parquet"

    def predictions(self, run: str, folds: Collection[int], *tables: str) -> dict[str, Path]:
        """``fold<k>/<table>`` -> file, as stages name the tables ``oof`` and ``test`` of a run's folds."""
        return {
            f"fold{fold}/{table}": self.fold_dir(run, fold) / f"{table}.parquet" for table in tables for fold in folds
        }

    def embeddings_dir(self, name: str) -> Path:
        return self.home / "embeddings" / name  # of one file of sequences

    def predictions_dir(self, name: str) -> Path:
        return self.home / "predictions" / name  # likewise

    def ensemble_dir(self, name: str) -> Path:
        return self.home / "ensembles" / name

    def kernel_dir(self, slug: str) -> Path:
        return self.home / "kernels" / slug  # a notebook's bundle and, once fetched, its output

    @property
    def csv_dir(self) -> Path:
        """``submissions/csv``; another artifacts folder has its own, where no other one's file is overwritten."""
        if self.submissions is not None:
            return self.submissions
        return _HOME / "submissions" / "csv" if self._usual else self.root / "submissions"

    @property
    def log(self) -> Path:
        """One line per evaluated run: ``submissions/LOG.md``, or one of another artifacts folder's own."""
        return (_HOME if self._usual else self.root) / "submissions" / "LOG.md"

    @property
    def _usual(self) -> bool:
        return self.root.resolve() == (_HOME / "artifacts").resolve()

    def submission(self, name: str, *, suffix: str = "csv") -> Path:
        return self.csv_dir / f"{self.comp}-{name}.{suffix}"
