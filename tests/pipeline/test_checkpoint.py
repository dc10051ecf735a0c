"""Checkpoints: committed whole or not at all, chosen by step, never loaded when damaged."""

import errno
import hashlib
import json
import math
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from pipeline.errors import DivergedError, StorageError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import CheckpointStore, DamagedError, load_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store: CheckpointStore, step: int, *, best: int | None = None, value: float | None = None) -> Path:
    weights = {"w": torch.full((3, 4), float(step if value is None else value))}
    state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "random": torch.get_rng_state(), "n": [1, "a"]}
    return store.save(step, weights=weights, training={"w": weights["w"] + 1}, state=state, meta={"best_step": best})


def test_what_is_saved_is_loaded(store):
    path = save(store, 25)
    loaded = store.load_newest()
    assert path.name == "step-00000025"
    assert loaded.meta["step"] == 25
    torch.testing.assert_close(loaded.weights["w"], torch.full((3, 4), 25.0))
    torch.testing.assert_close(loaded.training["w"], torch.full((3, 4), 26.0))
    assert loaded.state["n"] == [1, "a"]


def test_without_averaging_the_weights_are_stored_once(store):
    path = store.save(1, weights={"w": torch.ones(2)}, training=None, state={}, meta={"best_step": None})
    assert not (path / "training.safetensors").exists()
    torch.testing.assert_close(store.load_newest().training["w"], torch.ones(2))


def test_tied_weights_are_stored_too(store):
    shared = torch.ones(2)
    weights = {"a": shared, "b": shared}
    store.save(1, weights=weights, training=None, state={}, meta={"best_step": None})
    assert set(store.load_newest().weights) == {"a", "b"}


def test_the_newest_is_chosen_by_step_not_by_time(store):
    for step in (9, 100):
        save(store, step)
    os.utime(store.folder / "step-00000009", (2e9, 2e9))
    assert store.load_newest().meta["step"] == 100


def test_the_last_two_and_the_best_are_kept(store):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        save(store, step, best=best)
    assert list(store.steps()) == [5, 4, 2]
    assert store.best_folder().name == "step-00000002"


def test_before_any_validation_the_newest_is_the_best(store):
    save(store, 3)
    assert store.best_folder().name == "step-00000003"


def test_an_empty_folder_has_no_checkpoint(store):
    assert store.load_newest() is None
    assert store.newest_meta() is None
    with pytest.raises(StorageError, match="no readable checkpoint"):
        store.best_folder()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_remove(path: Path) -> None:
    path.unlink()


def damage_value(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 3'))


def test_a_changed_value_in_the_meta_data_is_noticed(store):
    save(store, 1)
    damage_value(save(store, 2) / "meta.json")
    assert store.load_newest().meta["step"] == 1


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_zero, damage_flip, damage_remove])
def test_a_damaged_checkpoint_is_set_aside_and_the_next_older_used(store, file, damage):
    save(store, 1)
    path = save(store, 2)
    damage(path / file)
    assert store.load_newest().meta["step"] == 1
    assert (store.folder / "bad" / "step-00000002" / "reason.txt").read_text()


def test_a_renamed_checkpoint_is_not_taken_for_another_step(store):
    """step-00000004 renamed to step-00000099: the run ended with "KeyError: 4", and was never finished."""
    save(store, 2)
    save(store, 4).rename(store.folder / "step-00000099")
    assert store.newest_meta()["step"] == 2
    assert store.best_folder().name == "step-00000002"
    assert store.load_newest().meta["step"] == 2
    assert (store.folder / "bad" / "step-00000099" / "reason.txt").read_text() == (
        "the folder was renamed: it holds step 4\n"
    )


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"sha256": 1, "files": []}', "\x00"])
def test_meta_data_of_another_shape_are_damage(store, text):
    """A meta.json of "[]" was a TypeError."""
    save(store, 1)
    (save(store, 2) / "meta.json").write_text(text)
    assert store.load_newest().meta["step"] == 1


@pytest.mark.parametrize("method", ["read_text", "read_bytes"])
def test_what_cannot_be_read_for_a_moment_is_left_where_it_is(store, monkeypatch, method):
    """Another user's files: all were moved to bad/, "every checkpoint is damaged"."""
    save(store, 1)
    save(store, 2)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with pytest.raises(PermissionError):
            store.load_newest()
    assert store.load_newest().meta["step"] == 2
    assert not (store.folder / "bad").exists()


@pytest.mark.parametrize("method", ["read_text", "read_bytes"])
def test_a_checkpoint_on_a_broken_place_of_the_disk_is_set_aside(store, monkeypatch, method):
    """Weights that the disk gave no more (EIO) ended each start of a run that had an older checkpoint."""
    save(store, 1)
    broken, read = save(store, 2), getattr(Path, method)

    def fail(path: Path, *arguments: object, **named: object) -> object:
        if path.parent == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, method, fail)
    assert store.load_newest().meta["step"] == 1


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(store, capsys):
    for step in (1, 2):
        damage_flip(save(store, step) / "model.safetensors")
    for _ in range(2):  # also when it is started again
        with pytest.raises(StorageError, match="every checkpoint is damaged"):
            store.load_newest()
    assert sorted(path.name for path in (store.folder / "bad").iterdir()) == ["step-00000001", "step-00000002"]
    assert capsys.readouterr().err.count("the next older checkpoint is used") == 2


def test_weights_that_are_not_finite_are_never_committed(store):
    save(store, 1)
    with pytest.raises(DivergedError, match="w is not finite"):
        save(store, 2, value=float("nan"))
    assert list(store.steps()) == [1]


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.marker}",))


def test_a_pickle_that_runs_code_is_refused(store, tmp_path):
    path, marker = save(store, 1), tmp_path / "marker"
    torch.save({"x": Malicious(marker)}, path / "state.pt", pickle_module=pickle)
    meta = json.loads((path / "meta.json").read_text())
    data = (path / "state.pt").read_bytes()
    meta["files"]["state.pt"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    del meta["sha256"]
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DamagedError, match="UnpicklingError"):
        load_checkpoint(path)
    assert not marker.exists()


def test_a_full_disk_costs_the_new_checkpoint_only_and_says_so(store, monkeypatch):
    for step in (1, 2):
        save(store, step)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="the disk is full; the checkpoint of step 3"):
        save(store, 3)
    monkeypatch.undo()
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000002"]
    assert store.load_newest().meta["step"] == 2


def test_a_file_system_that_flushes_no_folders_is_no_obstacle(store, monkeypatch):
    """Shared folders of virtual machines answer EINVAL: the first checkpoint ended the run with "Invalid argument"."""
    flush = os.fsync

    def refuse_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    saved = save(store, 1)
    assert store.steps() == {1: saved}


def test_a_file_that_may_not_be_as_large_is_named(store, monkeypatch):
    """Under ``ulimit -f``: "error: File too large", and not which file."""

    def limited(_path: Path, _data: bytes) -> int:
        raise OSError(errno.EFBIG, "File too large")

    save(store, 1)
    monkeypatch.setattr(Path, "write_bytes", limited)
    with pytest.raises(OSError, match=r"File too large: '.*step-00000002'"):
        save(store, 2)
    assert list(store.steps()) == [1]


def test_a_full_disk_is_helped_by_removing_older_checkpoints(store, monkeypatch):
    for step in (1, 2):
        save(store, step)
    write = Path.write_bytes

    def full_until_pruned(path: Path, data: bytes) -> int:
        if (store.folder / "step-00000001").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_until_pruned)
    save(store, 3)
    assert list(store.steps()) == [3, 2]


def test_a_full_disk_leaves_the_best_one_until_a_better_one_is_written(store, monkeypatch):
    """That of a better step, not written yet, was kept in its place, and a worse one predicted."""
    for step, best in ((1, 1), (2, 1), (3, 1)):
        save(store, step, best=best)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="The one before it is intact"):
        save(store, 4, best=4)
    monkeypatch.undo()
    assert store.best_folder().name == "step-00000001"
    assert list(store.steps()) == [3, 1]


def test_a_full_disk_at_the_first_checkpoint_promises_none_before_it(store, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(StorageError, match=r"step 1 needs .* Next: free space") as caught:
        save(store, 1)
    assert "intact" not in str(caught.value)


def test_what_the_disk_changes_while_it_is_written_is_not_committed(store, monkeypatch):
    save(store, 1)
    write = Path.write_bytes

    def flipped(path: Path, data: bytes) -> int:
        return write(path, data[:-1] + bytes([data[-1] ^ 1]) if path.suffix == ".safetensors" else data)

    monkeypatch.setattr(Path, "write_bytes", flipped)
    with pytest.raises(OSError, match=r"written and not read back: .* does not have its sha256"):
        save(store, 2)
    monkeypatch.undo()
    assert list(store.steps()) == [1]


def test_weights_that_are_not_finite_are_not_loaded_either(store, monkeypatch):
    """Such a checkpoint, sealed as it should be, was gone back to until the run gave up, a good one beside it."""
    save(store, 1)
    monkeypatch.setattr(checkpoint, "_not_finite", lambda _: None)
    save(store, 2, value=math.nan)
    monkeypatch.undo()
    assert store.load_newest().meta["step"] == 1
    assert "w is not finite" in (store.folder / "bad" / "step-00000002" / "reason.txt").read_text()


def test_saving_a_step_again_replaces_it(store):
    save(store, 1)
    save(store, 1, value=7.0)
    assert float(store.load_newest().weights["w"][0, 0]) == 7.0
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]


def test_leftovers_of_killed_runs_are_swept_and_never_used(store):
    save(store, 1)
    (store.folder / ".part-step-00000002-123").mkdir()
    assert store.load_newest().meta["step"] == 1
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
