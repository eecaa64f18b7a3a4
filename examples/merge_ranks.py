"""Two processes calibrate one layer on different data, and end with one state: the same bits on both.

    python examples/merge_ranks.py

Each process runs its shard of the batches through the same small model and records the inputs of its
second layer; one sees twice as much as the other. `all_merge` joins the two states over
torch.distributed (gloo). Both processes then choose the same scale and zero point, and these are, bit
for bit, those of one process that saw every batch. The exit status is not 0 if they are not. The same
states, written to files and merged without a network, give the same again. `--quick` uses less data.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

import functional_sq as fsq
from functional_sq.distributed import all_merge
from functional_sq.serialize import load, save

WORLD = 2
WIDTH = 64
SPEC = fsq.QuantSpec(torch.uint8, fsq.PerAxis(-1), mapping=fsq.MappingType.ASYMMETRIC)


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, 10)).eval()


def batch(index: int) -> torch.Tensor:
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(index))


def shard(rank: int, batches: int) -> range:
    """Return the batches of one rank: the first third, or the rest."""
    return range(batches // 3) if rank == 0 else range(batches // 3, batches)


def calibrated(indices: Iterable[int]) -> fsq.State:
    """Return what the second layer's input was over these batches."""
    net = model()
    state = fsq.init(SPEC, (1, WIDTH))
    with torch.no_grad():
        for index in indices:
            state = fsq.observe(SPEC, state, net[:2](batch(index)))
    return state


def work(rank: int, folder: str, batches: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)  # the same arithmetic in every process
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    own = calibrated(shard(rank, batches))
    save(Path(folder, f"own{rank}.safetensors"), {"layer": (SPEC, own)})
    merged = all_merge(SPEC, own)
    save(Path(folder, f"merged{rank}.safetensors"), {"layer": (SPEC, merged)})
    dist.destroy_process_group()


def same(a: fsq.QParams, b: fsq.QParams) -> bool:
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 batches instead of 3000")
    batches = 30 if parser.parse_args().quick else 3000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, batches), nprocs=WORLD)
        files = {path.stem: load(path)["layer"][1] for path in Path(folder).glob("*.safetensors")}

    whole = calibrated(range(batches))
    expected = fsq.calc_qparams(SPEC, whole)
    print(
        f"one process: {batches} batches, {int(whole['count'].sum())} values; scale {expected.scale[0, :3].tolist()}..."
    )
    offline = functools.reduce(functools.partial(fsq.merge, SPEC), (files[f"own{rank}"] for rank in range(WORLD)))
    states = {f"rank {rank} after all_merge": files[f"merged{rank}"] for rank in range(WORLD)}
    wrong = []
    for name, state in (states | {"the ranks' files, merged": offline}).items():
        equal = same(fsq.calc_qparams(SPEC, state), expected)
        print(f"{name}: {int(state['count'].sum())} values; qparams {'equal' if equal else 'DIFFER'} in bits")
        wrong += [] if equal else [name]
    for rank in range(WORLD):
        alone = fsq.calc_qparams(SPEC, files[f"own{rank}"])
        differ = int((alone.scale != expected.scale).sum())
        print(f"rank {rank} by its own shard ({len(shard(rank, batches))} batches): {differ} of {WIDTH} scales differ")
    if wrong:
        raise SystemExit(f"not the bits of one process: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
