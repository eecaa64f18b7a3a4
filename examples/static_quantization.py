"""Static quantization step by step, as torchao's tutorial walks it, on a current release.

    python examples/static_quantization.py

A small bfloat16 model is compiled, observed, calibrated and quantized: in uint8 (asymmetric) and in
float8 (symmetric), each in both forms that the tutorial has, a QuantizedLinear module and a plain
torch.nn.Linear whose weight is a tensor subclass. It runs on a CPU or a CUDA device. `--quick` leaves
the compiler at its default mode.
"""

from __future__ import annotations

import argparse
import copy

import torch

from bridge import (
    AffineQuantizedMinMaxObserver,
    MappingType,
    ObservedLinear,
    PerAxis,
    PerTensor,
    StaticQuantConfig,
    compute_error,
    insert_observers_,
    quantize_,
)


class TwoLinear(torch.nn.Module):
    def __init__(self, m: int = 64, n: int = 32, k: int = 64) -> None:
        super().__init__()
        self.linear1 = torch.nn.Linear(m, k, bias=False)
        self.linear2 = torch.nn.Linear(k, n, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.linear1(x))


def observer(
    dtype: torch.dtype, mapping: MappingType, granularity: PerTensor | PerAxis
) -> AffineQuantizedMinMaxObserver:
    return AffineQuantizedMinMaxObserver(
        mapping,
        dtype,
        granularity=granularity,
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.float32,
    )


def run(dtype: torch.dtype, mapping: MappingType, device: str, mode: str) -> None:
    torch.manual_seed(0)
    model = TwoLinear().eval().to(torch.bfloat16).to(device)
    data = [torch.randn(256, 64, dtype=torch.bfloat16, device=device) for _ in range(10)]
    test = torch.randn(256, 64, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        expected = model(test)

    # 1. The model may be compiled before anything else; it is compiled anew when its layers change.
    model = torch.compile(model, mode=mode)

    # 2. Observers go in: per-tensor activations, per-channel weights.
    insert_observers_(model, observer(dtype, mapping, PerTensor()), observer(dtype, mapping, PerAxis(axis=0)))

    # 3. Calibrate: run data through.
    with torch.no_grad():
        for x in data:
            model(x)
    seen = model.linear1.act_obs.state
    print(
        f"\n{dtype}: linear1 saw {int(seen['count'])} values from {seen['min'].item():.3f} to {seen['max'].item():.3f}"
    )

    # 4. Quantize, in both forms.
    for form in ("module", "tensor"):
        quantized = copy.deepcopy(model)
        quantize_(quantized, StaticQuantConfig(dtype, form=form), lambda m, name: isinstance(m, ObservedLinear))
        with torch.no_grad():
            sqnr = compute_error(expected.float(), quantized(test).float()).item()
        print(quantized)
        if form == "module":
            print(f"linear1.act_scale: {quantized.linear1.act_scale}")
            print(f"linear1.qweight: {quantized.linear1.qweight}")
        print(f"{dtype} as {form}: SQNR {sqnr:.1f} dB")
        if sqnr <= 25:
            raise SystemExit(f"{dtype} as {form}: SQNR {sqnr:.1f} dB is not above 25 dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compile in the default mode instead of max-autotune")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    mode = "default" if args.quick else "max-autotune"
    run(torch.uint8, MappingType.ASYMMETRIC, args.device, mode)
    run(torch.float8_e4m3fn, MappingType.SYMMETRIC, args.device, mode)


if __name__ == "__main__":
    main()
