"""Export to ONNX: one standard operator for each layer, any batch and length.

python examples/onnx_export.py      (needs onnxscript and onnxruntime)
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn
from torch.export import Dim

import fusedrnn
import fusedrnn.onnx


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fusedrnn.LSTM(16, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, x, lengths):
        return self.head(self.rnn(x, lengths=lengths)[0])


def main() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    batch, time = Dim("batch"), Dim("time")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "tagger.onnx")
        fusedrnn.onnx.export(
            model,
            (torch.randn(2, 6, 16), torch.tensor([6, 3])),
            path,
            dynamic_shapes={"x": {0: batch, 1: time}, "lengths": {0: batch}},
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path)
    x, lengths = torch.randn(3, 20, 16), torch.tensor([20, 1, 7])
    (found,) = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
    difference = (torch.from_numpy(found) - model(x, lengths)).abs().max().item()
    print(f"onnxruntime against eager: {difference:.1e}")


if __name__ == "__main__":
    main()
