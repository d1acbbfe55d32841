"""What does int8 do to an exported encoder: size, speed and logits?

    python benchmarks/int8_export.py

A classifier of the width of longformer-base with random weights, exported to ONNX; onnxruntime then
quantises the weights of its linear layers to int8, and their inputs as they come (dynamic
quantisation). Medians of rounds in which both graphs run once, in one process. The change of the
logits is their distance, over the norm of the logits.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import QuantType, quantize_dynamic
from side_by_side.contestants import Shape, adaptive_sparse_config
from side_by_side.measure import environment, interleaved_medians
from side_by_side.report import write_json
from side_by_side.results import add_results_arguments, results_folder

from adaptive_longformer import AdaptiveSparseForSequenceClassification
from adaptive_longformer.export import example, export

DEVICE = torch.device("cpu")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="int8 against float32 in ONNX Runtime.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    add_results_arguments(parser, "benchmarks/results")
    return parser.parse_args(argv)


def load(file: Path) -> InferenceSession:
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return InferenceSession(file, options, providers=["CPUExecutionProvider"])


def main() -> None:
    args = parse_arguments()
    folder = results_folder(args)
    about = environment(DEVICE)
    torch.manual_seed(0)
    config = adaptive_sparse_config(Shape(max(args.lengths), num_layers=args.layers), dropout=0.0)
    config.default_global_tokens, config.max_global_tokens = "first", 1
    model = AdaptiveSparseForSequenceClassification(config).eval()
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.onnx" for name in ("float32", "int8")}
        export(model, example(model, 2, 80, False), files["float32"])
        quantize_dynamic(files["float32"], files["int8"], weight_type=QuantType.QInt8)
        sessions = {name: load(file) for name, file in files.items()}
        for length in args.lengths:
            inputs = {name: ids.numpy() for name, ids in example(model, 1, length, False).items()}
            logits = {
                name: torch.from_numpy(session.run(["logits"], inputs)[0])
                for name, session in sessions.items()
            }
            medians = interleaved_medians(
                {
                    name: lambda session=session, inputs=inputs: session.run(None, inputs)
                    for name, session in sessions.items()
                },
                DEVICE, args.repeats,
            )  # fmt: skip
            for name, seconds in medians.items():
                change = (logits[name] - logits["float32"]).norm() / logits["float32"].norm()
                cell = {
                    "name": name, "length": length, "seconds": seconds,
                    "megabytes": files[name].stat().st_size / 1e6, "logit_change": change.item(),
                }  # fmt: skip
                cells.append(cell)
                print(*(f"{key} {value}" for key, value in cell.items()), sep="  ", flush=True)
    settings = {"hidden_size": config.hidden_size, "layers": args.layers}
    write_json(folder / "int8_export.json", environment=about, settings=settings, cells=cells)


if __name__ == "__main__":
    main()
