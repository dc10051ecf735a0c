"""Where files live: one place that names every artefact of every stage."""

from dataclasses import dataclass
from pathlib import Path

#: Folder of this checkout; configs, locks and the submissions log are found from here.
REPOSITORY = Path(__file__).resolve().parents[1]

#: Folder of a competition's artefacts -> the make target that fills it.
_TARGETS = {"clean": "data", "bpp": "bpp", "folds": "folds", "runs": "train", "ensembles": "ensemble"}


def how_to_make(path: Path) -> str:
    """The command that writes an artefact, for the end of a message.

    >>> how_to_make(Path("artifacts/rna3d/clean/train.parquet"))
    'make data COMP=rna3d'
    >>> how_to_make(Path("artifacts/rna3d/folds/sim80_k5.parquet"))
    'make folds COMP=rna3d SPLIT=sim80_k5'
    >>> how_to_make(Path("elsewhere.parquet"))
    'run the stage that writes it (make help)'
    """
    for folder in path.parents:
        if folder.name in _TARGETS and folder.parent.name:
            split = f" SPLIT={path.stem}" if folder.name == "folds" else ""
            return f"make {_TARGETS[folder.name]} COMP={folder.parent.name}{split}"
    return "run the stage that writes it (make help)"


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Files of one competition below one artifacts folder.

    ``artifacts/<comp>/raw|clean|bpp|arrays|folds|runs/<run>/fold<k>|ensembles/<name>``
    """

    comp: str
    root: Path = Path("artifacts")
    csv_dir: Path = REPOSITORY / "submissions" / "csv"
    log: Path = REPOSITORY / "submissions" / "LOG.md"  # one line per evaluated run

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

    @property
    def arrays_dir(self) -> Path:
        return self.home / "arrays"

    def fold_table(self, split: str) -> Path:
        return self.home / "folds" / f"{split}.parquet"

    def run_dir(self, run: str) -> Path:
        return self.home / "runs" / run

    def fold_dir(self, run: str, fold: int) -> Path:
        return self.run_dir(run) / f"fold{fold}"

    def oof(self, run: str, fold: int) -> Path:
        return self.fold_dir(run, fold) / "oof.parquet"

    def test(self, run: str, fold: int) -> Path:
        return self.fold_dir(run, fold) / "test.parquet"

    def ensemble_dir(self, name: str) -> Path:
        return self.home / "ensembles" / name

    def kernel_dir(self, slug: str) -> Path:
        return self.home / "kernels" / slug  # a notebook's bundle and, once fetched, its output

    def submission(self, name: str, *, suffix: str = "csv") -> Path:
        return self.csv_dir / f"{self.comp}-{name}.{suffix}"
