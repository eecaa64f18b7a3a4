"""Time quantize and dequantize beside torchao's and beside a pass over the same bytes, in one process.

    python examples/benchmarks/primitives.py

Each row is one primitive with int8 codes on one float32 tensor; the results of ours and torchao's are the same
bits. The floor is a compiled conversion, `x.to(int8)` or `q.to(float32)`: it reads and writes the same bytes.
All columns of a row are timed in turn; a cell is the median and its ratio to the floor. `--quick` takes a small
tensor and little time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from linear import Calls, cpu, keep_memory, table, torchao
from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

import functional_sq as fsq


def eager_and_compiled(name: str, call: Callable[..., torch.Tensor], *args: object) -> Calls:
    return {name: partial(torch.compile(call), *args), f"{name}, eager": partial(call, *args)}


def tasks(shape: tuple[int, int]) -> Iterator[tuple[str, Calls]]:
    x = torch.randn(shape)
    for name, granularity, block in (
        ("per tensor", fsq.PerTensor(), shape),
        ("per row", fsq.PerAxis(0), (1, shape[1])),
        ("groups of 32", fsq.PerGroup(32), (1, 32)),
    ):
        spec = fsq.QuantSpec(torch.int8, granularity, mapping=fsq.MappingType.ASYMMETRIC)
        qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, shape), x))
        q = fsq.quantize(spec, x, qp)
        torch.compiler.reset()  # All six would be more than Dynamo compiles of one wrapper.
        yield (
            f"quantize, {name}",
            {
                "floor": partial(torch.compile(lambda x: x.to(torch.int8)), x),
                **eager_and_compiled("ours", partial(fsq.quantize, spec), x, qp),
                **eager_and_compiled("torchao", quantize_affine, x, block, *qp, torch.int8),
            },
        )
        yield (
            f"dequantize, {name}",
            {
                "floor": partial(torch.compile(lambda q: q.to(torch.float32)), q),
                **eager_and_compiled("ours", partial(fsq.dequantize, spec), q, qp),
                **eager_and_compiled("torchao", dequantize_affine, q, block, *qp, torch.int8),
            },
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small tensor, little time")
    args = parser.parse_args()
    keep_memory()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    shape, seconds = ((64, 64), 0.1) if args.quick else ((4096, 1024), 5.0)
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchao {torchao.__version__}")
    print(f"{shape[0]}x{shape[1]} float32 and int8; medians in ms, and as multiples of the floor\n")
    table(tasks(shape), ("floor",), seconds)


if __name__ == "__main__":
    main()
