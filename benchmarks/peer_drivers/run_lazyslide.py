"""LazySlide on given tiles, by its own feature_extraction, with its own Python: `python run_lazyslide.py FOLDER`."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import lazyslide as zs
import numpy as np
import torch
from torchvision import transforms
from torchvision.models import resnet50
from wsidata import TileSpec, open_wsi
from wsidata.io import add_tiles

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
torch.set_num_threads(job["threads"])
net = resnet50()
net.fc = torch.nn.Identity()
net.load_state_dict(torch.load(folder / "backbone.pth"))
net.eval()
look = transforms.Compose([transforms.ToTensor(), transforms.Normalize(job["mean"], job["std"])])
wsi = open_wsi(job["slide"], reader="openslide", store=str(folder / "lazyslide.zarr"))
coords = np.load(folder / "coords.npy")
spec = TileSpec.from_wsidata(wsi, tile_px=job["tile_px"], mpp=job["mpp"], slide_mpp=job["slide_mpp"])
add_tiles(wsi, "tiles", coords, spec, np.zeros(len(coords), np.int64))
start = time.perf_counter()
zs.tl.feature_extraction(
    wsi,
    net,
    transform=look,
    batch_size=job["batch"],
    device=job["device"],
    key_added="ours",
    pbar=False,
    return_features=False,
)
wsi.write()
extract_s = time.perf_counter() - start
tiles, table = wsi.shapes["tiles"], wsi.tables["ours"]
np.savez(folder / "lazyslide.npz", coords=tiles[["x", "y"]].to_numpy(), features=np.asarray(table.X))
print(json.dumps({"version": version("lazyslide"), "torch": torch.__version__, "extract_s": extract_s}))
