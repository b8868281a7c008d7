"""Training speed: our loop against a plain one, images/s, each in a process of its own, in turns.

The plain loop is what the authors' example does: PIL, torchvision transforms, a DataLoader, fp32, SGD. Model, batch,
images and cores are the same.

    python benchmarks/train.py --pool POOL.toml [--arch densenet121] [--batch-size 32] [--image-px 224] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def plain(options: argparse.Namespace) -> float:
    """Images/s of a plain loop, after two iterations that warm up."""
    import torch
    from PIL import Image
    from torch import nn
    from torch.utils.data import DataLoader, Dataset, RandomSampler
    from torchvision import models, transforms

    from mtdp.tasks import load_pool

    side = options.image_px
    look = transforms.Compose(
        [
            transforms.Resize(side),
            transforms.RandomCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    tasks = load_pool(options.pool)
    samples = [(s.path, number, s.label) for number, task in enumerate(tasks) for s in task.of(("train", "val"))]

    class Images(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            path, task, label = samples[index]
            return look(Image.open(path).convert("RGB")), task, label

    torch.manual_seed(0)
    count = options.batch_size * options.iterations
    loader = DataLoader(
        Images(), options.batch_size, sampler=RandomSampler(range(len(samples)), num_samples=count), num_workers=2
    )
    net = models.get_model(options.arch, weights=None)
    dim = net.classifier.in_features if hasattr(net, "classifier") else net.fc.in_features
    setattr(net, "classifier" if hasattr(net, "classifier") else "fc", nn.Identity())
    heads = nn.ModuleList(nn.Linear(dim, len(task.classes)) for task in tasks)
    optimizer = torch.optim.SGD([*net.parameters(), *heads.parameters()], lr=1e-4, momentum=0.9)
    net.train()
    start_s, images = 0.0, 0
    for number, (batch, of_task, labels) in enumerate(loader):
        if number == 2:
            start_s = time.perf_counter()
        features = net(batch)
        losses = []
        for task in of_task.unique():
            rows = of_task == task
            losses.append(nn.functional.cross_entropy(heads[int(task)](features[rows]), labels[rows], reduction="sum"))
        optimizer.zero_grad()
        (torch.stack(losses).sum() / len(batch)).backward()
        optimizer.step()
        images += len(batch) if number >= 2 else 0
    return images / (time.perf_counter() - start_s)


def ours(options: argparse.Namespace) -> float:
    """Images/s of `mtdp-train pretrain`, by its own metrics, without the first ten iterations."""
    from mtdp.pretrain import pretrain
    from mtdp.pretrain_config import PretrainConfig
    from mtdp.tasks import load_pool

    config = PretrainConfig(
        arch=options.arch,
        init="random",
        iterations=10 + options.iterations,
        warmup=0,
        batch_size=options.batch_size,
        image_px=options.image_px,
        adaptation_batches=0,
        compile=options.compile,
    )
    with tempfile.TemporaryDirectory() as folder:
        pretrain(load_pool(options.pool), config, Path(folder), quiet=True)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    return float(options.batch_size * (last["iteration"] - 10) / (last["elapsed_s"] - first["elapsed_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--arch", default="densenet121")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--iterations", type=int, default=10, help="timed ones")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps({"images_per_s": (plain if options.only == "plain" else ours)(options)}))
        return
    found: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(options.repeats):
        for name, values in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            values.append(json.loads(output.splitlines()[-1])["images_per_s"])
            print(f"{name}: {values[-1]:.2f} images/s", flush=True)
    ratio = median(found["ours"]) / median(found["plain"])
    print(json.dumps({**{k: round(median(v), 2) for k, v in found.items()}, "ours/plain": round(ratio, 2)}))


if __name__ == "__main__":
    main()
