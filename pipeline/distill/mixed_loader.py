"""Batches of fixed composition from several stores; an epoch is a pass over the first one."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from molkd.pipeline.distill.coded import join_rows
from molkd.pipeline.distill.loader import Arrays, CacheLoader, Sample, ahead, pinned
from molkd.pipeline.distill.losses import Targets, Weights
from molkd.pipeline.distill.mixing import Composition, origin_weights
from molkd.pipeline.graphs.batch import join_batches
from molkd.pipeline.prefetch import prefetch_map


class MixedLoader:
    """An endless stream of batches like that of `CacheLoader`, each with systems of every store.

    The further stores are gone through again and again, reshuffled each time, at a pace of their own. What
    they give to a batch follows from its number, so the place in the first store is all there is to keep.

    Parameters
    ----------
    main : of the first store; its batch size is what it gives to a full batch
    extra : of the further stores, likewise; each with a seed of its own
    ratios : k of Eq. 9 for each further store
    """

    def __init__(self, main: CacheLoader, extra: Sequence[CacheLoader], ratios: Sequence[float]) -> None:
        self.loaders = (main, *extra)
        self.ratios = tuple(ratios)
        full = tuple(loader.batch_size for loader in self.loaders)
        self.composition = Composition(int(main.subset.sum()), full)
        self.epoch = 0
        self.batch_in_epoch = 0  # the next batch to deliver

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the first store; the last may be smaller."""
        return self.composition.n_batches

    def state_dict(self) -> dict[str, int]:
        """Where all streams stand: the next batch delivered is the first not yet seen."""
        return {"epoch": self.epoch, "batch_in_epoch": self.batch_in_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict`."""
        self.epoch, self.batch_in_epoch = state["epoch"], state["batch_in_epoch"]

    def __iter__(self) -> Iterator[Sample]:
        """Deliver batches for ever; close the iterator to stop the thread."""
        read = self._read(self.epoch, self.batch_in_epoch)
        samples = prefetch_map(self._build, read, *ahead(self.loaders[0].pin))
        try:
            for sample in samples:
                if self.batch_in_epoch == self.batches_per_epoch:
                    self.epoch, self.batch_in_epoch = self.epoch + 1, 0
                self.batch_in_epoch += 1
                yield sample
        finally:
            samples.close()

    def _build(self, origins: list[list[Arrays]]) -> Sample:
        made = zip(self.loaders, origins, strict=True)
        sample = join_samples(
            [[loader.make_sample(a) for a in arrays] for loader, arrays in made], self.ratios
        )
        return pinned(sample) if self.loaders[0].pin else sample

    def _read(self, epoch: int, batch: int) -> Iterator[list[list[Arrays]]]:
        """Yield the arrays of each batch, by origin."""
        main = self.loaders[0]
        extra = [self._stream(origin, epoch, batch) for origin in range(1, len(self.loaders))]
        for number in itertools.count(epoch):
            for first in main.read(main.plan(number), batch):
                yield [[first], *(next(stream) for stream in extra)]
            batch = 0

    def _stream(self, origin: int, epoch: int, batch: int) -> Iterator[list[Arrays]]:
        """Yield what a further store gives to each batch: several pieces where a pass over it ends."""
        loader = self.loaders[origin]
        n_systems = int(loader.subset.sum())
        turn, place = divmod(self.composition.place(origin, epoch, batch), n_systems)
        n_batches = self.batches_per_epoch
        counts = (self.composition.count(origin, b % n_batches) for b in itertools.count(batch))
        pieces: list[Arrays] = []
        missing = next(counts)
        for number in itertools.count(turn):
            borders, fills = [place], []
            while borders[-1] < n_systems:
                taken = min(missing, n_systems - borders[-1])
                borders.append(borders[-1] + taken)
                fills.append(taken == missing)
                missing = next(counts) if fills[-1] else missing - taken
            plan = replace(loader.plan(number), batch_ptr=np.array(borders))
            for piece, is_last in zip(loader.read(plan), fills, strict=True):
                pieces.append(piece)
                if is_last:
                    yield pieces
                    pieces = []
            place = 0


def join_samples(origins: Sequence[Sequence[Sample]], ratios: Sequence[float]) -> Sample:
    """Make one batch of the samples of each origin, weighted by Eqs. 9 to 11.

    Where every origin counts alike there are no weights, and losses are those of any other batch.

    Parameters
    ----------
    origins : the main store's samples, then those of each further store
    ratios : k of each further store
    """
    samples = [sample for origin in origins for sample in origin]
    targets = [sample.targets for sample in samples]
    joined = Targets(
        energy=torch.cat([t.energy for t in targets]),
        forces=torch.cat([t.forces for t in targets]),
        free=torch.cat([t.free for t in targets]),
        teacher={name: join_rows([t.teacher[name] for t in targets]) for name in targets[0].teacher},
    )
    if any(k != 1 for k in ratios):
        counts = [sum(s.batch.n_systems for s in origin) for origin in origins]
        weights = origin_weights(counts, ratios)
        of_sample = torch.tensor([w for w, origin in zip(weights, origins, strict=True) for _ in origin])
        rows = zip(*(_row_counts(sample) for sample in samples), strict=True)  # systems, atoms, edges
        joined = joined._replace(
            weights=Weights(*(of_sample.repeat_interleave(torch.tensor(n)) for n in rows))
        )
    return Sample(join_batches([s.batch for s in samples]), joined)


def _row_counts(sample: Sample) -> tuple[int, int, int]:
    return sample.batch.n_systems, sample.batch.n_atoms, len(sample.targets.teacher.get("edge", ()))
