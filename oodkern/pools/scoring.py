"""Scores of a pool under a head: streamed, of the logits that are never stored, into files that are mapped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodkern.backends import backend_for
from oodkern.ops._checks import check_count, check_floating, check_temperature, score_dtype
from oodkern.ops.linear_energy import LinearScores, linear_energy, linear_scores
from oodkern.pools.heartbeat import Heartbeat
from oodkern.pools.score_files import PoolScores, ScoreFiles
from oodkern.pools.store import CHUNK_ROWS, FeatureStore
from oodkern.pools.streaming import staged_chunks
from oodkern.processes import ALONE, Processes

SCORES = tuple(name for name in LinearScores._fields if name != "argmax")
Head = nn.Linear | tuple[Tensor, Tensor | None]
BLOCK = 1 << 20  # numbers that are widened at once on the CPU: 4 MiB
PIECE_ROWS = 1 << 18  # of each score go between processes at once


@torch.no_grad()
def score_pool(
    store: FeatureStore | Tensor,
    head: Head,
    scores: Iterable[str] = ("energy", "joint_energy", "msp"),
    *,
    temperature: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
    device: torch.device | str | None = None,
    out: str | os.PathLike | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> PoolScores:
    """Scores of each row of a pool under a head, in one pass over the features.

        scores = score_pool(FeatureStore.open("pool"), model.fc)
        hardest = scores["energy"].argsort()[:10_000]

    Args:
        store: a FeatureStore, or features [N, D] in memory.
        head: an nn.Linear, or (weight [K, D], bias [K] or None), K >= 1. In the store's dtype it is taken as it is; in
            another one in float32 (a float64 head is rounded to it), and in float64 where the features are float64.
        scores: which of energy, joint_energy, max_logit and msp, as `oodkern.linear_scores` has them: as OOD scores
            take energy, -joint_energy, -max_logit, -msp.
        temperature: T > 0 of the energy, -T log sum_k exp(z_k / T), in units of the logits. The others have none; msp
            is the largest softmax probability at 1.
        chunk_rows: rows that are read, and on a GPU copied, at once; no more than two chunks are held.
        device: where it is computed; where the head is, unless given.
        out: a folder, made where it is not there, for NAME.npy of each score, written under temporary names and renamed
            when all are complete. Without it they are in files without a name, where `tempfile` has its own (TMPDIR).
        progress: shows a bar, in rows.
        processes: which take shares of the chunks; every process has all scores, the same bits as one process forms
            with as many threads. The first writes to `out`.

    Returns:
        `PoolScores`, a mapping by name. A row with NaN has NaN in all of them.

    Pages of features and scores are files', which the system drops when it needs the memory; beyond them it holds
    chunks, and what the ops hold, whatever N. Raises TypeError or ValueError for an argument of the wrong kind, shape
    or range before any work, OSError where the disk is full, and Elsewhere where another process failed.
    """
    names = _check_scores(scores)
    if isinstance(store, Tensor):
        check_floating(store, "store")
        if store.dim() != 2:
            raise ValueError(f"store: expected [N, D], got {list(store.shape)}")
        store = FeatureStore.of(store)
    elif not isinstance(store, FeatureStore):
        raise TypeError(f"store: expected a FeatureStore or a torch.Tensor, got {type(store).__name__}")
    weight, bias = _check_head(head, store)
    temperature = check_temperature(temperature)
    check_count(chunk_rows, "chunk_rows", 1)
    place = weight.device if device is None else torch.device(device)
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")

    weight = weight.to(place).contiguous()
    bias = None if bias is None else bias.to(place).contiguous()
    scorer = Scorer(names, weight, bias, temperature)
    with ScoreFiles(names, len(store), store.dtype, folder, processes) as files:
        rows = _share(store, chunk_rows, processes)
        _score(scorer, store, rows, chunk_rows, place, files, progress, processes)
        if processes.count > 1:
            _exchange(files, names, store, chunk_rows, place, processes)
        return files.finish()


def _check_scores(scores: Iterable[str]) -> tuple[str, ...]:
    if isinstance(scores, str) or not isinstance(scores, Iterable):
        raise TypeError(f"scores: expected names, such as ('energy', 'msp'), got {scores!r}")
    names = tuple(scores)
    if not names:
        raise ValueError(f"scores: expected one at least of {', '.join(SCORES)}, got none")
    for name in names:
        if name not in SCORES:
            raise ValueError(f"scores: expected some of {', '.join(SCORES)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"scores: expected each name once, got {', '.join(names)}")
    return names


def _check_head(head: Any, store: FeatureStore) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as they are computed with: both in the store's dtype, or both in float32 (float64)."""
    if isinstance(head, nn.Linear):
        head = head.weight, head.bias
    if not isinstance(head, tuple | list) or len(head) != 2:
        given = f"{len(head)} of them" if isinstance(head, tuple | list) else type(head).__name__
        raise TypeError(f"head: expected an nn.Linear or a pair (weight, bias), got {given}")
    weight, bias = head
    check_floating(weight, "head's weight")
    if weight.dim() != 2 or weight.shape[1] != store.dimension or len(weight) == 0:
        raise ValueError(
            f"head's weight: expected [K, {store.dimension}] as features are, K >= 1, got {list(weight.shape)}"
        )
    if bias is not None:
        check_floating(bias, "head's bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"head's bias: expected [{len(weight)}], one number a class, got {list(bias.shape)}")
    if any(one is not None and one.dtype != store.dtype for one in (weight, bias)):
        wide = torch.float64 if store.dtype == torch.float64 else torch.float32
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    return weight.detach(), None if bias is None else bias.detach()


class Scorer:
    """The passes over a chunk that its scores take.

    One pass of `linear_scores` has all of them, and reads 16-bit features beside a float32 head as they are; the op of
    one score is faster by 1 to 11 %, or slower, and not where it has to be given widened features (CPU, K = 100 and
    1,000, D = 128). So a score has the same bits whichever others are asked for. The pass has no temperature: an energy
    of another one than 1 is formed by its own op, of features that are widened block by block.
    """

    def __init__(self, names: tuple[str, ...], weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        self.weight, self.bias, self.temperature = weight, bias, temperature
        self.hot = temperature != 1 and "energy" in names
        self.together = tuple(name for name in names if not (self.hot and name == "energy"))
        self.buffer = weight.new_empty(0)

    def __call__(self, chunk: Tensor) -> Iterator[tuple[int, str, Tensor]]:
        """(first row in the chunk, name of a score, its values [n])."""
        if self.together:
            # Plain PyTorch forms the logits of what it is given.
            by_kernel = backend_for("linear_energy", chunk, len(self.weight)) != "reference"
            for first, block in self.blocks(chunk, whole=by_kernel):
                found = linear_scores(block, self.weight, self.bias)
                for name in self.together:
                    yield first, name, getattr(found, name)
        if self.hot:
            for first, block in self.blocks(chunk, whole=False):
                yield first, "energy", linear_energy(self.widened(block), self.weight, self.bias, self.temperature)

    def blocks(self, chunk: Tensor, whole: bool) -> Iterator[tuple[int, Tensor]]:
        rows = max(BLOCK // max(chunk.shape[1], 1), 1)
        if whole or chunk.device.type != "cpu":
            rows = max(len(chunk), 1)
        return ((first, chunk[first : first + rows]) for first in range(0, len(chunk), rows))

    def widened(self, block: Tensor) -> Tensor:
        """The block in the head's dtype, until the next one is widened."""
        if block.dtype == self.weight.dtype:
            return block
        if len(self.buffer) < len(block):
            self.buffer = self.weight.new_empty(block.shape)
        return self.buffer[: len(block)].copy_(block)


def _share(store: FeatureStore, chunk_rows: int, processes: Processes) -> slice:
    """This process's rows: of whole chunks, so that each row is scored among the same ones whoever does it."""
    starts = [at for shard in store.shards for at in range(shard.start, shard.start + shard.rows, chunk_rows)]
    bounds = [*starts, len(store)]
    own = processes.share(len(starts))
    return slice(bounds[own.start], bounds[own.stop])


def _score(
    scorer: Scorer,
    store: FeatureStore,
    rows: slice,
    chunk_rows: int,
    device: torch.device,
    files: ScoreFiles,
    progress: bool,
    processes: Processes,
) -> None:
    """Scores the rows; each process for itself."""
    from tqdm import tqdm

    bar: Any = {"desc": "scores", "unit": " rows", "unit_scale": True, "leave": False}
    bar["disable"] = not (progress and processes.first)
    with Heartbeat(processes) as heartbeat, tqdm(total=rows.stop - rows.start, **bar) as shown, _unrounded(device):
        for offset, chunk in staged_chunks(store, chunk_rows, device, rows.start, rows.stop):
            for first, name, values in scorer(chunk):
                files.write(name, offset + first, values.cpu().numpy())
            shown.update(len(chunk))
            heartbeat.beat()


def _unrounded(device: torch.device) -> Any:
    """Under autocast the head would be rounded to its dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _exchange(
    files: ScoreFiles,
    names: tuple[str, ...],
    store: FeatureStore,
    chunk_rows: int,
    device: torch.device,
    processes: Processes,
) -> None:
    """Each process's scores become all processes', a piece at a time."""
    import torch.distributed as dist

    dtype = score_dtype(torch.empty(0, dtype=store.dtype))
    for rank in range(processes.count):
        rows = _share(store, chunk_rows, Processes(rank, processes.count))
        for start in range(rows.start, rows.stop, PIECE_ROWS):
            stop = min(start + PIECE_ROWS, rows.stop)
            for name in names:
                if rank == processes.rank:
                    piece = torch.from_numpy(files.read(name, start, stop).copy()).to(device)
                else:
                    piece = torch.empty(stop - start, dtype=dtype, device=device)
                dist.broadcast(piece, src=rank)
                if rank != processes.rank:
                    files.write(name, start, piece.cpu().numpy())
