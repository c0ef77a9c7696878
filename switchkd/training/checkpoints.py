"""Checkpoints of a run: what they hold, when one counts as whole, and which one a run goes on from.

`checkpoint-STEP/` holds `method.safetensors` (the method's state without its frozen teachers), transformers'
optimizer, scheduler and random states, `trainer_state.json`, `training_args.json`, `run.json` (what decides
the weights) and `checkpoint.json`, written last: the step and every file with its size and SHA-256. A folder whose
files do not match that list is never taken for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

STATE = "method.safetensors"
RUN = "run.json"
MANIFEST = "checkpoint.json"
STAGING = ".incomplete"


def method_state(method: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `method` without its frozen teachers' (`method.frozen`), by name; tied tensors once,
    under their first name."""
    state, seen = {}, set()
    frozen = tuple(f"{name}." for name in method.frozen)
    for name, tensor in method.state_dict(keep_vars=True).items():
        if not name.startswith(frozen) and id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def drop_frozen(method: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """As a hook of `method.state_dict()`: takes its frozen teachers out of `state`."""
    for name in [name for name in state if name.startswith(tuple(f"{child}." for child in method.frozen))]:
        del state[name]


def gather(state: Mapping[str, Tensor], step: int, keep: bool = True) -> dict[str, Tensor]:
    """The tensors of `state` whole, detached and on the CPU; {} where `keep` is False.

    Under ZeRO-3 each rank holds a share, so every rank has to call this, those that keep nothing too. Raises
    ValueError on every rank when a tensor is not finite after optimizer step `step`.
    """
    whole = {}
    for name, tensor in state.items():
        if hasattr(tensor, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None):
                _check_finite(name, tensor, step)
                if keep:
                    whole[name] = tensor.detach().cpu().clone()
        else:
            _check_finite(name, tensor, step)
            if keep:
                whole[name] = tensor.detach().cpu().contiguous()
    return whole


def _check_finite(name: str, tensor: Tensor, step: int) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{name} is not finite after step {step}, nothing of it is saved: start again with a lower learning "
            "rate or a smaller max_grad_norm"
        )


def save_state(method: nn.Module, folder: Path, step: int, keep: bool = True) -> None:
    """Write `method_state` after `step` into `folder`; a collective under ZeRO-3, where only ranks with `keep`
    write.

    Raises ValueError when it is not finite, and then writes nothing.
    """
    state = gather(method_state(method), step, keep)
    if keep:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / STATE, metadata={"format": "pt"})


def load_state(method: nn.Module, folder: Path) -> None:
    """Read what `save_state` wrote into `method`, exactly; a collective under ZeRO-3.

    Raises ValueError when the names differ.
    """
    saved, expected = load_file(folder / STATE), method_state(method).keys()
    if saved.keys() != expected:
        missing, unknown = sorted(expected - saved.keys()), sorted(saved.keys() - expected)
        raise ValueError(
            f"{folder / STATE} does not fit this method: it lacks {len(missing)} names {missing[:3]} and has "
            f"{len(unknown)} unknown ones {unknown[:3]}; build the method as the saved run did"
        )
    with torch.no_grad():
        for name, tensor in method_state(method).items():
            if hasattr(tensor, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    tensor.copy_(saved[name])
            else:
                tensor.copy_(saved[name])


def seal(folder: Path, step: int) -> None:
    """Write the file list of a finished folder, which is read once for it (0.9 GB/s a file on one CPU core)."""
    hashes = _hashes(folder, _files(folder))
    sizes = {name: (folder / name).stat().st_size for name in hashes}
    files = {name: {"bytes": sizes[name], "sha256": hashes[name]} for name in hashes}
    write_json(folder / MANIFEST, {"step": step, "files": files})


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by file name; hashlib lets the threads run side by side."""

    def read(name: str) -> str:
        whole, block = hashlib.sha256(), bytearray(1 << 22)
        with (folder / name).open("rb", buffering=0) as file:
            while size := file.readinto(block):
                whole.update(memoryview(block)[:size])
        return whole.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(read, names), strict=True))


def put_in_place(staged: Path, final: Path) -> None:
    """Bring a finished folder to the disk and give it its name; one of that name is replaced, and stays until the
    new one stands."""
    for path in [*staged.rglob("*"), staged]:
        _to_disk(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    former = final.with_name(f".{final.name}.former")
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
    os.replace(staged, final)
    _to_disk(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _to_disk(path: Path) -> None:
    # Without this a power cut can leave a renamed folder whose files are empty.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flaw(folder: Path) -> str | None:
    """Why `folder` is not a whole checkpoint, or None when it is one. Reads all of it where sizes and names are right:
    a disk that lost power can leave a file of the right size full of zeros."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step = int(manifest["step"])
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if (named := _step_named(folder)) not in (None, step):
        return f"its {MANIFEST} is of step {step}, its name of step {named}"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if unlisted := sorted({*_files(folder)} - {*files, MANIFEST}):
        return f"{unlisted[0]} is not in its {MANIFEST}"
    found = _hashes(folder, files)
    if other := [name for name, (_, sha256) in files.items() if found[name] != sha256]:
        return f"{other[0]} has other bytes than were saved"
    return None


def _step_named(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def _numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints of `folder`, whole or not, by their step, newest first."""
    found = {_step_named(path): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return {step: found[step] for step in sorted(found.keys() - {None}, reverse=True)}


def rotate(folder: Path, keep: int | None, best: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints of `folder` and the one of step `best`; None keeps all."""
    for step, path in list(_numbered(folder).items())[keep:] if keep else ():
        if step != best:
            shutil.rmtree(path, ignore_errors=True)


def step_of(folder: Path) -> int:
    """The optimizer step after which a whole checkpoint was written."""
    return json.loads((folder / MANIFEST).read_text())["step"]


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The whole checkpoint of the highest step in `folder`, or None; torn ones are passed over with a
    warning."""
    for path in _numbered(Path(folder)).values():
        reason = flaw(path)
        if reason is None:
            return path
        logger.warning("%s is passed over as a checkpoint: %s", path, reason)
    return None


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, default=str) + "\n")


def disk_error(error: Exception, what: str, folder: Path, kept: Path | None) -> OSError:
    """One sentence for a save that failed: what, where, how much room there was, why, what is still whole."""
    free = shutil.disk_usage(folder if folder.exists() else Path.cwd()).free / 2**20
    rest = f"{kept} is whole" if kept else "no earlier one exists"
    return OSError(f"{what} could not be saved in {folder} ({free:.0f} MiB free): {error}; {rest}")
