"""The compiled scan: built where there is a compiler, done without where there is none, and the same numbers."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import library

from models.layers import compiled_scan, extension
from models.layers.selective_scan import selective_scan, selective_scan_ref
from tests.models.cases import check_threads_change_no_bit
from tests.models.test_selective_scan import NAMES, arguments, relative

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(not compiled_scan.load()[0], reason=compiled_scan.load()[1])

#: length, channels, states: whole and broken chunks of 32 positions and blocks of 16 channels
SHAPES = [(1, 1, 1), (31, 16, 16), (32, 17, 16), (33, 33, 8), (130, 5, 3), (35, 20, 64), (35, 20, 128)]
PROGRAM = """
from models.layers import kernels
from models.layers.selective_scan import selective_scan
from tests.models.test_selective_scan import arguments
y = selective_scan(*arguments(40))
print(f"{y.double().abs().sum():.6f}", *kernels.choose("selective_scan", y.device))
"""


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_and_chunks_that_are_not_full_give_what_the_reference_gives(shape, reverse):
    length, inner, state = shape
    args = arguments(length, inner=inner, state=state)
    found, expected = selective_scan(*args, reverse=reverse), selective_scan_ref(*args, reverse=reverse)
    assert relative(found, expected) < 1e-5
    grads = torch.autograd.grad(found.square().sum(), args), torch.autograd.grad(expected.square().sum(), args)
    for name, grad, wanted in zip(NAMES, *grads, strict=True):
        assert relative(grad, wanted.double()) < 1e-5, name


@needs_compiler
def test_a_decay_that_underflows_is_zero_and_not_noise():
    u, _, A, B, C, D = arguments(40)
    far = torch.full_like(u, 1e4)
    y = selective_scan(u, far, A, B, C, D)
    assert relative(y, selective_scan_ref(u, far, A, B, C, D)) < 1e-5


@needs_compiler
@pytest.mark.parametrize("place", range(6), ids=NAMES)
def test_what_is_not_a_number_stays_so(place):
    """The power of two is put together from bits, which must not make a number of it."""
    args = [x.detach() for x in arguments(9, inner=16)]
    args[place].view(-1)[0] = float("nan")
    assert selective_scan(*args).isnan().any()


@needs_compiler
def test_the_operator_keeps_the_rules_of_compilers_and_autograd():
    library.opcheck(torch.ops.rna_scan.forward.default, (*arguments(35, inner=20), False))


@needs_compiler
@pytest.mark.parametrize(("batch", "inner"), [(1, 300), (5, 40), (40, 17)])
def test_outputs_and_gradients_have_the_same_bits_whatever_the_number_of_threads(batch, inner):
    """Was: dB and dC were added up in as many parts as there were threads, so a run resumed elsewhere drifted."""
    check_threads_change_no_bit(selective_scan, arguments(70, inner=inner, batch=batch))


@needs_compiler
def test_without_a_compiler_everything_works_and_the_reason_is_said(tmp_path):
    variables = {"PYTHONPATH": str(ROOT), "RNA_CACHE": str(tmp_path), "CXX": "/nonexistent/c++", "RNA_KERNELS": ""}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    total, path, reason = done.stdout.strip().split(" ", 2)
    assert path == "reference"
    assert reason.startswith("plain PyTorch; compiled: could not be compiled")
    assert float(total) == pytest.approx(selective_scan(*arguments(40)).double().abs().sum().item(), rel=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_takes_no_file_is_said_with_the_variable_that_names_another_place(tmp_path, monkeypatch):
    """In a container of another user's the slow path was taken, and nothing said how to get the fast one."""

    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setenv("RNA_CACHE", str(tmp_path / "closed"))
    monkeypatch.setattr(Path, "mkdir", refuse)
    built, why = extension.load.__wrapped__("selective_scan")
    assert not built
    assert why.endswith("; RNA_CACHE=<folder> names another place for it")


def test_a_cache_that_is_named_needs_no_home(tmp_path, monkeypatch):
    """Without HOME, and with a user that the system does not know, Path.home() fails."""
    monkeypatch.setenv("RNA_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: pytest.fail("asked for the home"))
    monkeypatch.setattr(extension, "_compile", lambda source, stem, flags: stem)
    assert extension._built("selective_scan").parent == tmp_path


@pytest.mark.parametrize(
    ("system", "refused", "tried"),
    [("linux", True, [["-fopenmp"], []]), ("linux", False, [["-fopenmp"]]), ("darwin", True, [[]])],
)
def test_without_openmp_an_operator_is_compiled_for_one_thread_and_that_is_said(
    tmp_path, monkeypatch, system, refused, tried
):
    """Apple's compiler refused -fopenmp, "unsupported option", and every Mac took plain PyTorch."""
    asked = []

    def build(source: Path, folder: str, flags: list[str], openmp: list[str]) -> Path:
        asked.append(openmp)
        if openmp and refused:
            raise RuntimeError("Error building extension\nclang++: error: unsupported option '-fopenmp'")
        made = Path(folder, f"{source.stem}.so")
        made.write_bytes(b"code")
        return made

    monkeypatch.setenv("RNA_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(extension, "_load", build)
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    built, why = extension.load.__wrapped__("selective_scan")
    assert (built, asked) == (True, tried)
    assert ("on one thread (no OpenMP)" in why) == refused
    monkeypatch.setattr(extension, "_load", lambda *_: pytest.fail("compiled though it is there"))
    assert extension.load.__wrapped__("selective_scan") == (built, why)


def test_what_a_compiler_says_is_repeated_and_not_its_command(monkeypatch):
    """It said: could not be compiled (RuntimeError: Error building extension 'long_conv': [1/2] clang++ -MMD -MF)."""

    def refuse(_: str) -> Path:
        raise RuntimeError("Error building extension: [1/2] c++ -MMD\na.cpp:1:2: error: no such function\nmore")

    monkeypatch.setattr(extension, "_built", refuse)
    assert extension.load.__wrapped__("long_conv") == (
        False,
        "could not be compiled (RuntimeError: error: no such function)",
    )


def _write(source: Path, stem: Path, flags: list[str]) -> Path:
    """What a compiler does, for tests of what is kept."""
    made = stem.with_name(f"{stem.name}-{hashlib.sha256(b'code').hexdigest()[:16]}.so")
    made.write_bytes(b"code")
    return made


@pytest.mark.parametrize("damage", [b"", b"co", b"cod\0"], ids=["emptied", "cut", "zeroed"])
def test_a_compiled_file_that_is_not_what_was_compiled_is_compiled_again(tmp_path, monkeypatch, damage):
    """Cut in half it ended every process that loaded it by SIGBUS; empty, the slow path was taken ever after."""
    monkeypatch.setenv("RNA_CACHE", str(tmp_path))
    monkeypatch.setattr(extension, "_compile", _write)
    built = extension._built("selective_scan")
    monkeypatch.setattr(extension, "_compile", lambda *_: pytest.fail("compiled though it is there"))
    assert extension._built("selective_scan") == built
    built.write_bytes(damage)
    monkeypatch.setattr(extension, "_compile", _write)
    assert extension._built("selective_scan") == built
    assert built.read_bytes() == b"code"


@needs_compiler
def test_what_is_compiled_is_named_after_what_it_holds():
    built = extension._built("selective_scan")
    assert built.stem.endswith(f"-{hashlib.sha256(built.read_bytes()).hexdigest()[:16]}")


@needs_compiler
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)], ids=["no sequence", "no position"])
def test_empty_input_gives_empty_output_and_zero_gradients(batch, length):
    """Was: a division by zero that ended the process, in the backward pass of an empty batch."""
    args = [x.detach().requires_grad_() for x in arguments(length, inner=20, batch=batch)]
    y = selective_scan(*args)
    assert y.shape == (batch, length, 20)
    assert all(not grad.any() for grad in torch.autograd.grad(y.sum(), args))


@needs_compiler
@pytest.mark.parametrize("place", range(1, 6), ids=NAMES[1:])
def test_shapes_and_layouts_that_do_not_fit_are_refused_and_not_read(place):
    """Was: reads beyond the end of a tensor."""
    args = [x.detach() for x in arguments(9, inner=16)]
    for wrong in (args[place][..., :-1].contiguous(), args[place].repeat_interleave(2, -1)[..., ::2]):
        with pytest.raises(RuntimeError, match="selective_scan: "):
            torch.ops.rna_scan.forward(*args[:place], wrong, *args[place + 1 :], False)
