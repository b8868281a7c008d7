"""WSInfer on given tiles, by its own run_inference, with its own Python: `python run_wsinfer.py FOLDER`.

The tiles are handed over as its patching step leaves them. It takes a softmax of what the network returns, so what is
stored here is the logarithm of its output: the features, less a constant of each tile. The network divides them by
about their largest value first, or small ones would vanish in the softmax.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pandas
import torch
from torchvision.models import resnet50
from wsinfer.modellib.models import LocalModelTorchScript
from wsinfer.modellib.run_inference import run_inference
from wsinfer.wsi import set_backend
from wsinfer_zoo.client import ModelConfiguration

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
torch.set_num_threads(job["threads"])
set_backend("openslide")


class Divided(torch.nn.Module):
    """A network whose outputs are of the order of one."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        with torch.inference_mode():
            self.largest = float(net(torch.randn(1, 3, 224, 224)).abs().max())

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.net(tiles) / self.largest


results = folder / "wsinfer"
(results / "patches").mkdir(parents=True)
slide = Path(job["slide"])
side = round(job["tile_px"] * job["scale"])
with h5py.File(results / "patches" / f"{slide.stem}.h5", "w") as file:
    coords = file.create_dataset("coords", data=np.load(folder / "coords.npy"))
    coords.attrs.update({"patch_level": 0, "patch_size": side})
net = resnet50()
net.fc = torch.nn.Identity()
net.load_state_dict(torch.load(folder / "backbone.pth"))
torch.jit.script(Divided(net.eval())).save(folder / "wsinfer.pt")
config = ModelConfiguration.from_dict(
    {
        "spec_version": "1.0",
        "architecture": "resnet50",
        "num_classes": 2048,
        "class_names": [str(i) for i in range(2048)],
        "patch_size_pixels": job["tile_px"],
        "spacing_um_px": job["mpp"],
        "transform": [
            {"name": "Resize", "arguments": {"size": job["tile_px"]}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": job["mean"], "std": job["std"]}},
        ],
    }
)
start = time.perf_counter()
failed = run_inference(
    slide.parent,
    results,
    LocalModelTorchScript(config=config, model_path=str(folder / "wsinfer.pt")),
    batch_size=job["batch"],
    num_workers=0,  # its default
)
extract_s = time.perf_counter() - start
assert not any(failed), failed
table = pandas.read_csv(results / "model-outputs-csv" / f"{slide.stem}.csv")
features = np.log(table.filter(like="prob_").to_numpy())
np.savez(folder / "wsinfer.npz", coords=table[["minx", "miny"]].to_numpy(), features=features)
print(json.dumps({"version": version("wsinfer"), "torch": torch.__version__, "extract_s": extract_s}))
