"""TIAToolbox on given tiles, by its own DeepFeatureExtractor, with its own Python: `python run_tiatoolbox.py FOLDER`.

It has no way to be given tiles, so the coordinates that its dataset has laid out are replaced before it reads them.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import zarr
from tiatoolbox.models.architecture.vanilla import CNNBackbone
from tiatoolbox.models.engine.deep_feature_extractor import DeepFeatureExtractor
from torchvision.models import resnet50

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
torch.set_num_threads(job["threads"])
net = resnet50()
net.fc = torch.nn.Identity()
net.load_state_dict(torch.load(folder / "backbone.pth"))
model = CNNBackbone("resnet50")
model.feat_extract = torch.nn.Sequential(*list(net.children())[:-2])
mean, std = np.float32(job["mean"]), np.float32(job["std"])
model.preproc_func = lambda tile: (tile / np.float32(255) - mean) / std
coords = np.load(folder / "coords.npy")
corners = np.round(coords / job["scale"]).astype(int)


class GivenTiles(DeepFeatureExtractor):
    def get_dataloader(self, *arguments, **options):  # type: ignore[no-untyped-def]
        loader = super().get_dataloader(*arguments, **options)
        loader.dataset.inputs = np.concatenate([corners, corners + job["tile_px"]], axis=1)
        return loader


engine = GivenTiles(model, batch_size=job["batch"], num_workers=0, device="cpu", verbose=False)  # 0: its default
start = time.perf_counter()
written = engine.run(
    images=[Path(job["slide"])],
    patch_mode=False,
    patch_input_shape=(job["tile_px"], job["tile_px"]),
    stride_shape=(job["tile_px"], job["tile_px"]),
    input_resolutions=[{"units": "mpp", "resolution": job["mpp"]}],
    auto_get_mask=False,
    wsireader_kwargs={"mpp": (job["slide_mpp"], job["slide_mpp"])},
    save_dir=folder / "tiatoolbox",
    output_type="zarr",
)
extract_s = time.perf_counter() - start
features = zarr.open(str(next(iter(written.values()))), mode="r")["features"][:]
assert len(features) == len(coords), len(features)
np.savez(folder / "tiatoolbox.npz", coords=coords, features=features)
print(json.dumps({"version": version("tiatoolbox"), "torch": torch.__version__, "extract_s": extract_s}))
