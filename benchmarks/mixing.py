"""How well an epoch mixes: the variance of batch means, over that of a full shuffle.

    python benchmarks/mixing.py STORE [--batch-size 32] [--epochs 400]

The value is each system's energy label per atom, which neighbours in a file of trajectories share. Each epoch
takes another seed of the stored order, as a store made anew would have. Blocks and windows are scaled down
with a small store, to 64 and 8: so many that shuffling within windows alone could not mix what is far apart.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from molkd.cache_schema.epoch import iterate_epoch
from molkd.cache_schema.layout import stored_order
from molkd.cache_schema.reader import Cache


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=400)
    args = parser.parse_args()
    with Cache.open(args.store) as cache:
        in_files = np.lexsort((cache.source_row, cache.source))
        in_files = in_files[np.isfinite(cache.energy[in_files])]
        ids, n_atoms = cache.ids[in_files], cache.system_n_atoms[in_files]
        value = cache.energy[in_files] / n_atoms
    value = (value - value.mean()) / value.std()
    n = len(value) // args.batch_size * args.batch_size
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {"order of the files": [], "epochs": [], "full shuffle": []}
    for epoch in range(args.epochs):
        order = stored_order(ids, epoch)
        store = SimpleNamespace(path=args.store, n_systems=len(order), system_n_atoms=n_atoms[order])
        plan = iterate_epoch(
            store,  # what it looks at of a store
            batch_size=args.batch_size,
            seed=0,
            epoch=epoch,
            block_atoms=max(int(n_atoms.sum()) // 64, 1),
        )
        orders = (np.arange(n), order[plan.order], random.permutation(len(value)))
        for ratios, systems in zip(found.values(), orders, strict=True):
            means = value[systems[:n]].reshape(-1, args.batch_size).mean(axis=1)
            ratios.append(args.batch_size * np.mean(means**2))
    ideal = np.mean(found["full shuffle"])
    for name, ratios in found.items():
        print(f"{name}: {np.mean(ratios) / ideal:.3f} ± {np.std(ratios) / len(ratios) ** 0.5 / ideal:.3f}")


if __name__ == "__main__":
    main()
